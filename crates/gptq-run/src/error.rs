//! Errors of this crate.

use std::path::PathBuf;

use gptq_calibration::CalibrationError;
use gptq_export::ExportError;
use gptq_format::FormatError;
use gptq_kernels::{DeviceError, LinkError};
use gptq_model::ModelError;
use gptq_plan::{PlanError, at_least, spelt};
use gptq_ranks::{Cause, Ended, RankError};
use gptq_solver::SolverError;
use gptq_spec::SpecError;
use thiserror::Error;

use crate::Overflow;

/// Reasons that a run cannot be started or finished.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum RunError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(
        "{source}, with a budget of {}; a smaller --device-memory keeps more hidden states on the host",
        spelt(*budget)
    )]
    OutOfDeviceMemory { source: DeviceError, budget: u64 },
    #[error(
        "{}: made with different inputs or settings ({difference}); use --restart to replace it, or choose another \
         output directory", dir.display()
    )]
    Finished { dir: PathBuf, difference: String },
    #[error(
        "{}: contains an interrupted run with different inputs or settings ({difference}); use --restart to start \
         over, or choose another output directory", dir.display()
    )]
    Unfinished { dir: PathBuf, difference: String },
    #[error("{}: contains no interrupted run to resume", dir.display())]
    NothingUnfinished { dir: PathBuf },
    #[error(
        "{}: {} are needed and {} are free; make room, or choose another directory",
        dir.display(), at_least(*needed, 1 << 20), spelt(*free)
    )]
    DiskSpace {
        dir: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error(transparent)]
    Ranks(RankError),
    #[error("{0}")]
    Link(LinkError),
    #[error(
        "ranks {} and {} have the same device of {host}; give each rank a GPU of its own, as torchrun, srun and mpirun do \
         with one process for each GPU of a host", ranks[0], ranks[1]
    )]
    SharedDevice { ranks: [usize; 2], host: String },
    #[error(
        "rank {rank} on {host} has other inputs or settings than rank 0 ({difference}); start all ranks with one command"
    )]
    OtherRank {
        rank: usize,
        host: String,
        difference: String,
    },
    #[error("stopped {}", progress(*done, *layers))]
    Stopped { done: usize, layers: usize },
    #[error("{}, {modules}: {source}", whose(branch))]
    Solver {
        branch: String,
        modules: String,
        source: Box<SolverError>,
    },
    #[error("{}, {modules}: {source}", whose(branch))]
    HiddenStates {
        branch: String,
        modules: String,
        source: Overflow,
    },
    #[error(
        "{}, {modules}: the Hessian is not positive definite below damping {needed}, and [numerics] max_damping is \
         {most}; use more calibration tokens or raise max_damping",
        whose(branch)
    )]
    Damping {
        branch: String,
        modules: String,
        needed: f64,
        most: f64,
    },
}

impl From<RankError> for RunError {
    /// A rank that was stopped stops all of them.
    fn from(error: RankError) -> Self {
        match error {
            RankError::Ended(Ended {
                cause: Cause::Stopped,
                ..
            }) => RunError::Stopped { done: 0, layers: 0 },
            error => RunError::Ranks(error),
        }
    }
}

impl RunError {
    /// Returns the cause that the other ranks are told.
    pub(crate) fn cause(&self) -> Cause {
        match self {
            RunError::Stopped { .. } => Cause::Stopped,
            error => Cause::Failed(error.to_string()),
        }
    }
}

/// The work that failed: probes of size budgets belong to no branch yet.
fn whose(branch: &str) -> String {
    match branch {
        "" => "sensitivity pass for budget_bits".to_owned(),
        name => format!("branch {name}"),
    }
}

fn progress(done: usize, layers: usize) -> String {
    match done {
        0 => "before the first block was finished; nothing was written".to_owned(),
        _ => format!("after block {done} of {layers}; the same command resumes from there"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_while_a_budget_is_measured_names_no_branch() {
        let failed = |branch: &str| RunError::Damping {
            branch: branch.to_owned(),
            modules: "model.layers.0.mlp.down_proj".to_owned(),
            needed: 1.0,
            most: 0.5,
        };
        let line = failed("").to_string();
        assert!(
            line.starts_with("sensitivity pass for budget_bits, model.layers.0"),
            "{line}"
        );
        let line = failed("main").to_string();
        assert!(line.starts_with("branch main, model.layers.0"), "{line}");
    }
}
