//! The one error type of this crate.

use std::path::PathBuf;

use gptq_calibration::CalibrationError;
use gptq_format::FormatError;
use gptq_kernels::{DeviceError, SolveError};
use gptq_model::ModelError;
use thiserror::Error;

use crate::byte_size::{at_least, spelt};
use crate::{Overflow, RecipeError};

/// Why a run could not be planned or finished.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PipelineError {
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(
        "{}: quantized by gptq already; quantize the full-precision model that it was made from",
        dir.display()
    )]
    Quantized { dir: PathBuf },
    #[error(
        "the device memory budget is {}, and this run needs at least {}; give more with --device-memory, shorten \
         the windows with --seq-len, or use --device cpu",
        spelt(*budget), at_least(*needed, *budget)
    )]
    DeviceMemory { needed: u64, budget: u64 },
    #[error(
        "the host memory budget is {}, and this run needs at least {}; give more with --host-memory, or shorten \
         the windows with --seq-len",
        spelt(*budget), at_least(*needed, *budget)
    )]
    HostMemory { needed: u64, budget: u64 },
    #[error(
        "{source}, with a budget of {}; a smaller --device-memory keeps more hidden states on the host",
        spelt(*budget)
    )]
    OutOfDeviceMemory { source: DeviceError, budget: u64 },
    #[error(
        "{}: made with something else ({difference}); --restart makes it again, or choose another \
         output directory", dir.display()
    )]
    Finished { dir: PathBuf, difference: String },
    #[error(
        "{}: an unfinished run is here, begun with something else ({difference}); --restart begins \
         anew, or choose another output directory", dir.display()
    )]
    Unfinished { dir: PathBuf, difference: String },
    #[error("{}: no unfinished run is here that could go on", dir.display())]
    NothingUnfinished { dir: PathBuf },
    #[error(
        "{}: not a journal that can be gone on from: {reason}; --restart begins anew", path.display()
    )]
    Journal { path: PathBuf, reason: String },
    #[error(
        "{}: {} are needed here and {} are free; make room, or choose another directory",
        dir.display(), at_least(*needed, 1 << 20), spelt(*free)
    )]
    DiskSpace {
        dir: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error("stopped {}", progress(*done, *layers))]
    Stopped { done: usize, layers: usize },
    #[error("{}, {modules}: {source}", whose(branch))]
    Solver {
        branch: String,
        modules: String,
        source: Box<SolveError>,
    },
    #[error("{}, {modules}: {source}", whose(branch))]
    HiddenStates {
        branch: String,
        modules: String,
        source: Overflow,
    },
    #[error(
        "{}, {modules}: the Hessian is not positive definite below damping {needed}, and [numerics] max_damping is \
         {most}; use more calibration tokens or allow more",
        whose(branch)
    )]
    Damping {
        branch: String,
        modules: String,
        needed: f64,
        most: f64,
    },
}

/// What was being solved: what is measured for size budgets belongs to no branch yet.
fn whose(branch: &str) -> String {
    match branch {
        "" => "measuring for budget_bits".to_owned(),
        name => format!("branch {name}"),
    }
}

fn progress(done: usize, layers: usize) -> String {
    match done {
        0 => "before the first block was finished; nothing is left behind".to_owned(),
        _ => format!("after block {done} of {layers}; the same command goes on from there"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_told_in_the_unit_they_were_given_in() {
        let error = PipelineError::HostMemory {
            needed: 140_401_778,
            budget: 120 << 20,
        };
        let line = error.to_string();
        assert!(
            line.contains("budget is 120MiB, and this run needs at least 133.9MiB"),
            "{line}"
        );
    }

    #[test]
    fn what_fails_while_a_budget_is_measured_names_no_branch() {
        let failed = |branch: &str| PipelineError::Damping {
            branch: branch.to_owned(),
            modules: "model.layers.0.mlp.down_proj".to_owned(),
            needed: 1.0,
            most: 0.5,
        };
        let line = failed("").to_string();
        assert!(
            line.starts_with("measuring for budget_bits, model.layers.0"),
            "{line}"
        );
        let line = failed("main").to_string();
        assert!(line.starts_with("branch main, model.layers.0"), "{line}");
    }
}
