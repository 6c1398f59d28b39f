//! Files written on a thread of their own, while the device works on what comes next.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

use gptq_format::{Checkpoint, FormatError};
use gptq_kernels::Incoming;

use crate::branch_writer::BranchWriter;

/// Packed linears that may wait for the disk.
const WAITING: usize = 24;

/// A packed linear of a branch.
struct Job {
    branch: usize,
    module: String,
    packed: Incoming,
}

/// The writing thread's end of the run.
pub(crate) struct WriteBehind<'scope> {
    sender: Option<SyncSender<Job>>,
    thread: Option<ScopedJoinHandle<'scope, Result<Vec<BranchWriter>, FormatError>>>,
}

impl<'scope> WriteBehind<'scope> {
    /// Starts with what the branches have in common with the base model.
    pub(crate) fn spawn<'env>(
        scope: &'scope Scope<'scope, 'env>,
        writers: Vec<BranchWriter>,
        checkpoint: &'env Checkpoint,
    ) -> Self {
        let (sender, receiver) = sync_channel(WAITING);
        WriteBehind {
            sender: Some(sender),
            thread: Some(scope.spawn(move || write(writers, checkpoint, receiver))),
        }
    }

    /// Queues a linear of branch `branch`; waits while the queue is full.
    ///
    /// # Errors
    /// What stopped the writing thread.
    pub(crate) fn write(
        &mut self,
        branch: usize,
        module: String,
        packed: Incoming,
    ) -> Result<(), FormatError> {
        let job = Job {
            branch,
            module,
            packed,
        };
        let sent = self.sender.as_ref().is_some_and(|it| it.send(job).is_ok());
        match sent {
            true => Ok(()),
            false => self.join().map(|_| ()),
        }
    }

    /// Waits for all that was queued.
    ///
    /// # Errors
    /// What stopped the writing thread.
    pub(crate) fn finish(mut self) -> Result<Vec<BranchWriter>, FormatError> {
        self.join()
    }

    fn join(&mut self) -> Result<Vec<BranchWriter>, FormatError> {
        self.sender = None;
        let thread = self
            .thread
            .take()
            .expect("joined once: an error ends the run");
        match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn write(
    mut writers: Vec<BranchWriter>,
    checkpoint: &Checkpoint,
    jobs: Receiver<Job>,
) -> Result<Vec<BranchWriter>, FormatError> {
    for writer in &mut writers {
        writer.copy_shared(checkpoint)?;
    }
    for job in jobs {
        writers[job.branch].write(&job.module, &job.packed.wait())?;
    }
    Ok(writers)
}
