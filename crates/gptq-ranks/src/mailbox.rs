//! Bytes that other ranks have sent to this one, and how the run ended.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::{Ended, RankError};

/// A rank's mailbox.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    state: Mutex<MailboxState>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct MailboxState {
    /// By sender.
    waiting: Vec<VecDeque<Vec<u8>>>,
    /// Ranks that have done their part, by rank.
    left: Vec<bool>,
    ended: Option<Ended>,
}

impl Mailbox {
    /// Makes one for letters from `size` ranks.
    pub(crate) fn new(size: usize) -> Self {
        Mailbox {
            state: Mutex::new(MailboxState {
                waiting: vec![VecDeque::new(); size],
                left: vec![false; size],
                ended: None,
            }),
            news: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, MailboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes bytes from rank `from` in.
    pub(crate) fn put(&self, from: usize, bytes: Vec<u8>) {
        self.state().waiting[from].push_back(bytes);
        self.news.notify_all();
    }

    /// Notes how the run ended; the first end counts.
    pub(crate) fn end(&self, ended: Ended) {
        self.state().ended.get_or_insert(ended);
        self.news.notify_all();
    }

    /// Notes that a rank has done its part.
    pub(crate) fn leave(&self, rank: usize) {
        self.state().left[rank] = true;
        self.news.notify_all();
    }

    /// True if a rank has done its part.
    pub(crate) fn has_left(&self, rank: usize) -> bool {
        self.state().left[rank]
    }

    /// Returns how the run ended, if it has.
    pub(crate) fn ended(&self) -> Option<Ended> {
        self.state().ended.clone()
    }

    /// Fails if the run has ended.
    pub(crate) fn check(&self) -> Result<(), RankError> {
        self.ended().map_or(Ok(()), |it| Err(RankError::Ended(it)))
    }

    /// Waits for the next bytes from rank `from`.
    pub(crate) fn take(&self, from: usize) -> Result<Vec<u8>, RankError> {
        self.wait(|state| state.waiting[from].pop_front())
    }

    /// Waits until `ranks` have done their part.
    pub(crate) fn wait_left(&self, ranks: std::ops::Range<usize>) -> Result<(), RankError> {
        self.wait(|state| state.left[ranks.clone()].iter().all(|&it| it).then_some(()))
    }

    fn wait<T>(
        &self,
        mut look: impl FnMut(&mut MailboxState) -> Option<T>,
    ) -> Result<T, RankError> {
        let mut state = self.state();
        loop {
            if let Some(ended) = &state.ended {
                return Err(RankError::Ended(ended.clone()));
            }
            if let Some(found) = look(&mut state) {
                return Ok(found);
            }
            state = (self.news.wait(state)).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
