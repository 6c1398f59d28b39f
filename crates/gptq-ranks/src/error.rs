//! Errors of this crate, and the end of a run on another rank.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Reason for which a rank ends a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// A signal asked for it.
    Stopped,
    /// An error, in one line.
    Failed(String),
}

/// The end of a run, as its other ranks are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// The rank that ended it.
    pub rank: usize,
    /// Its host.
    pub host: String,
    /// Its reason.
    pub cause: Cause,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ended { rank, host, cause } = self;
        match cause {
            Cause::Stopped => write!(f, "rank {rank} on {host} was stopped"),
            Cause::Failed(line) => write!(f, "rank {rank} on {host}: {line}"),
        }
    }
}

/// Reasons that ranks do not come together, or stay together.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum RankError {
    #[error("{0}")]
    Ended(Ended),
    #[error("{0} ranks cannot share a run; 1, 2, 4 and 8 can")]
    Size(usize),
    #[error("{name} = {value:?} is not {wanted}")]
    Variable {
        name: &'static str,
        value: String,
        wanted: String,
    },
    #[error("{launcher} sets {name}, but not {missing}; set it for every rank")]
    Unset {
        launcher: &'static str,
        name: &'static str,
        missing: &'static str,
    },
    #[error(
        "rank 0 cannot listen at {address}: {reason}; another run may use that port, MASTER_PORT chooses another"
    )]
    Listen { address: String, reason: String },
    #[error("{ranks} of {size} did not come to rank 0 at {address} within {seconds} s")]
    Missing {
        ranks: String,
        size: usize,
        address: String,
        seconds: u64,
    },
    #[error("rank {rank}: rank 0 does not answer at {address} ({reason}) within {seconds} s")]
    NoAnswer {
        rank: usize,
        address: String,
        reason: String,
        seconds: u64,
    },
    #[error("{0}")]
    Refused(String),
    #[error("rank {from} sent {found} bytes where {wanted} are due")]
    Length {
        from: usize,
        found: usize,
        wanted: usize,
    },
}
