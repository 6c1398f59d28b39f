//! Files written on a thread of their own, while the device works on what comes next.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle, scope};

use gptq_format::{Checkpoint, FormatError};
use gptq_kernels::Incoming;
use gptq_plan::{BranchBlock, FinishedBlock};

use crate::branch_writer::BranchWriter;
use crate::journal::Journal;
use crate::solve::SolvedSink;

/// Packed linears that may wait for the disk.
const WAITING: usize = 24;

enum Job {
    /// A packed linear of a branch.
    Linear {
        branch: usize,
        module: String,
        packed: Incoming,
    },
    /// All of a block has been queued.
    Block {
        layer: usize,
        /// Digest of the tensors that it was made from.
        source: String,
        /// Seconds of each branch so far, and its linears of the block.
        branches: Vec<BranchBlock>,
        /// SHA-256 of the hidden states after it, where they were kept.
        states: Option<String>,
    },
}

/// The writing thread's end of the run.
pub(crate) struct WriteBehind<'scope> {
    sender: Option<SyncSender<Job>>,
    thread: Option<ScopedJoinHandle<'scope, Result<Vec<BranchWriter>, FormatError>>>,
}

impl<'scope> WriteBehind<'scope> {
    /// Starts with what the branches have in common with the base model. Finished blocks go into
    /// `journal` under `names`, the branches'.
    pub(crate) fn spawn<'env>(
        scope: &'scope Scope<'scope, 'env>,
        writers: Vec<BranchWriter>,
        checkpoint: &'env Checkpoint,
        mut journal: Journal,
        names: Vec<String>,
    ) -> Self {
        let (sender, receiver) = sync_channel(WAITING);
        WriteBehind {
            sender: Some(sender),
            thread: Some(
                scope.spawn(move || write(writers, checkpoint, &mut journal, &names, receiver)),
            ),
        }
    }

    fn send(&mut self, job: Job) -> Result<(), FormatError> {
        let sent = self.sender.as_ref().is_some_and(|it| it.send(job).is_ok());
        match sent {
            true => Ok(()),
            false => self.join().map(|_| ()),
        }
    }

    /// Waits for all that was queued.
    ///
    /// # Errors
    /// The error that stopped the writing thread.
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

impl SolvedSink for WriteBehind<'_> {
    /// Queues a linear; waits while the queue is full. An error is what stopped the writing thread.
    fn linear(
        &mut self,
        branch: usize,
        module: String,
        packed: Incoming,
    ) -> Result<(), FormatError> {
        self.send(Job::Linear {
            branch,
            module,
            packed,
        })
    }

    /// Queues the record of a block: it goes into the journal once the block's linears are on the disk.
    fn block(
        &mut self,
        layer: usize,
        source: String,
        branches: Vec<BranchBlock>,
        states: Option<String>,
    ) -> Result<(), FormatError> {
        self.send(Job::Block {
            layer,
            source,
            branches,
            states,
        })
    }
}

fn write(
    mut writers: Vec<BranchWriter>,
    checkpoint: &Checkpoint,
    journal: &mut Journal,
    names: &[String],
    jobs: Receiver<Job>,
) -> Result<Vec<BranchWriter>, FormatError> {
    for writer in &mut writers {
        writer.copy_shared(checkpoint)?;
    }
    for job in jobs {
        match job {
            Job::Linear {
                branch,
                module,
                packed,
            } => writers[branch].write(&module, &packed.wait())?,
            Job::Block {
                layer,
                source,
                mut branches,
                states,
            } => {
                sync(&mut writers)?;
                for (writer, block) in writers.iter().zip(&mut branches) {
                    writer.digest(&mut block.linears);
                }
                let branches = names.iter().cloned().zip(branches).collect();
                journal.append(&FinishedBlock {
                    layer,
                    source,
                    branches,
                    states,
                })?;
            }
        }
    }
    Ok(writers)
}

/// Waits for the disk on behalf of all branches at once.
fn sync(writers: &mut [BranchWriter]) -> Result<(), FormatError> {
    scope(|scope| {
        let waits = writers.iter().map(|it| scope.spawn(|| it.sync()));
        let waits: Vec<_> = waits.collect();
        let mut done = waits.into_iter().map(|it| it.join());
        done.try_for_each(|it| it.expect("no reason to panic"))
    })
}
