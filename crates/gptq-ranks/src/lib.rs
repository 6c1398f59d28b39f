//! The ranks of a run: threads or processes that share the windows and rows of one run.
//!
//! Reading order: `lanes.rs` says who has which windows, and in which order sums are taken whatever the number of ranks;
//! [`Collective`] is what ranks tell each other; [`OneRank`], [`Threads`] and [`Processes`] are one rank, threads of this
//! process, and processes on one or many hosts; [`RankLaunch`] is what a launcher says of a process.
//!
//! Messages go between rank 0 and one other rank, in an order that all ranks know: a run is one program, and each rank
//! comes to the same calls. A rank that ends with an error says so, and the next call of every other one fails with that.

#![forbid(unsafe_code)]

mod alone;
mod collective;
mod error;
mod frame;
mod join;
mod lanes;
mod launch;
mod mailbox;
mod processes;
mod threads;

pub use alone::OneRank;
pub use collective::Collective;
pub use error::{Cause, Ended, RankError};
pub use join::{JoinOptions, join};
pub use lanes::{LANES, RankShare, tree};
pub use launch::{Launcher, RankLaunch};
pub use processes::Processes;
pub use threads::{Threads, check_size};

/// Returns the name of this host.
pub fn host() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}
