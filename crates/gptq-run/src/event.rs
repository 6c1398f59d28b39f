//! Events of a run.

use std::path::Path;

use gptq_plan::{Allocation, BlockReport, BranchReport, LinearReport};

/// An event of a run, told as it happens. A branch is an index into the plan.
#[derive(Debug)]
pub enum Event<'a> {
    /// The output directory is on a file system without locks: nothing keeps a second run away.
    NotLocked {
        /// The directory.
        dir: &'a Path,
    },
    /// Calibration windows are drawn.
    Calibrated {
        /// Warnings about the text, one line each.
        warnings: &'a [String],
    },
    /// Windows are drawn and the model is open; the blocks come next.
    Started {
        /// Tokens to calibrate on.
        tokens: usize,
        /// Linears each branch will quantize.
        linears: &'a [usize],
    },
    /// A branch was finished by an earlier run.
    AlreadyFinished {
        /// The branch.
        branch: usize,
        /// Its report.
        report: &'a BranchReport,
    },
    /// Costs of the budgets' choices were measured in another block.
    Measured {
        /// Number of blocks measured so far.
        layers: usize,
    },
    /// A budget is spent, now or by an earlier run.
    Allocated {
        /// The branch.
        branch: usize,
        /// The allocation of its budget.
        allocation: &'a Allocation,
    },
    /// An earlier run finished some blocks of the branches that come next; they go on from there.
    Resumed {
        /// Number of finished blocks.
        layers: usize,
        /// Number of blocks that need not be run again, as the hidden states after them were kept.
        kept: usize,
    },
    /// Hidden states are on the disk.
    StatesSaved {
        /// Number of blocks the states have passed.
        layers: usize,
    },
    /// Hidden states were to be kept, but are not on the disk.
    StatesNotSaved {
        /// Number of blocks the states have passed.
        layers: usize,
        /// No room, a disk that fails, or a run that is to stop.
        why: &'a str,
    },
    /// A linear is done, or was and is taken over.
    Linear {
        /// The branch.
        branch: usize,
        /// Its numbers.
        report: &'a LinearReport,
    },
    /// A branch's output after a block was compared with the dense model's.
    Block {
        /// The branch.
        branch: usize,
        /// Its numbers.
        report: &'a BlockReport,
    },
    /// A branch directory is in place.
    Finished {
        /// Which.
        branch: usize,
        /// Its report.
        report: &'a BranchReport,
    },
}

impl<'a> Event<'a> {
    /// The same event with its branch, an index into `branches`, as the index that stands there.
    pub(crate) fn of(self, branches: &[usize]) -> Event<'a> {
        match self {
            Event::Linear { branch, report } => Event::Linear {
                branch: branches[branch],
                report,
            },
            Event::Block { branch, report } => Event::Block {
                branch: branches[branch],
                report,
            },
            Event::Finished { branch, report } => Event::Finished {
                branch: branches[branch],
                report,
            },
            Event::Allocated { branch, allocation } => Event::Allocated {
                branch: branches[branch],
                allocation,
            },
            other => other,
        }
    }
}
