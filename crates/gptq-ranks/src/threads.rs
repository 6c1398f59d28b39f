//! Ranks that are threads of one process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::mailbox::Mailbox;
use crate::{Cause, Collective, Ended, LANES, RankError, RankShare, host};

/// A rank that is a thread of a process with all others. One that is dropped before it leaves ends the run.
#[derive(Debug)]
pub struct Threads {
    share: RankShare,
    mailboxes: Arc<Vec<Mailbox>>,
    left: AtomicBool,
}

impl Threads {
    /// Makes `size` ranks.
    ///
    /// # Errors
    /// A number of ranks that cannot share a run.
    pub fn ranks(size: usize) -> Result<Vec<Threads>, RankError> {
        check_size(size)?;
        let mailboxes: Arc<Vec<Mailbox>> =
            Arc::new((0..size).map(|_| Mailbox::new(size)).collect());
        let ranks = (0..size).map(|rank| Threads {
            share: RankShare { rank, size },
            mailboxes: mailboxes.clone(),
            left: AtomicBool::new(false),
        });
        Ok(ranks.collect())
    }

    fn own(&self) -> &Mailbox {
        &self.mailboxes[self.share.rank]
    }
}

/// Checks that so many ranks can share a run.
///
/// # Errors
/// They cannot.
pub fn check_size(size: usize) -> Result<(), RankError> {
    match size > 0 && LANES.is_multiple_of(size) {
        true => Ok(()),
        false => Err(RankError::Size(size)),
    }
}

impl Collective for Threads {
    fn share(&self) -> RankShare {
        self.share
    }

    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), RankError> {
        self.check()?;
        self.mailboxes[to].put(self.share.rank, bytes);
        Ok(())
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>, RankError> {
        self.own().take(from)
    }

    fn check(&self) -> Result<(), RankError> {
        self.own().check()
    }

    fn end(&self, cause: Cause) {
        self.left.store(true, Ordering::Relaxed);
        let ended = Ended {
            rank: self.share.rank,
            host: host(),
            cause,
        };
        self.mailboxes.iter().for_each(|it| it.end(ended.clone()));
    }

    fn leave(&self) -> Result<(), RankError> {
        self.left.store(true, Ordering::Relaxed);
        self.mailboxes
            .iter()
            .for_each(|it| it.leave(self.share.rank));
        self.own().wait_left(0..self.share.size)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if !self.left.load(Ordering::Relaxed) {
            self.end(Cause::Failed("it ended without a word".to_owned()));
        }
    }
}
