//! The only rank of a run.

use crate::{Cause, Collective, RankError, RankShare};

/// The only rank of a run, who has nobody to tell anything.
#[derive(Clone, Copy, Debug, Default)]
pub struct OneRank;

impl Collective for OneRank {
    fn share(&self) -> RankShare {
        RankShare::ALL
    }

    fn send(&self, _to: usize, _bytes: Vec<u8>) -> Result<(), RankError> {
        unreachable!("there is no other rank")
    }

    fn receive(&self, _from: usize) -> Result<Vec<u8>, RankError> {
        unreachable!("there is no other rank")
    }

    fn check(&self) -> Result<(), RankError> {
        Ok(())
    }

    fn end(&self, _cause: Cause) {}

    fn leave(&self) -> Result<(), RankError> {
        Ok(())
    }
}
