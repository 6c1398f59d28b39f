//! Errors of this crate.

use std::path::PathBuf;

use gptq_calibration::CalibrationError;
use gptq_format::FormatError;
use gptq_spec::SpecError;
use thiserror::Error;

use crate::RecipeError;
use crate::byte_size::{at_least, spelt};

/// Reasons that a run cannot be planned, or that its records cannot be read.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum PlanError {
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    #[error(
        "{}: already quantized by gptq; quantize the full-precision model it was made from",
        dir.display()
    )]
    Quantized { dir: PathBuf },
    #[error(
        "the device memory budget is {}, and this run needs at least {}; raise it with --device-memory, shorten \
         the windows with --seq-len, or use --device cpu",
        spelt(*budget), at_least(*needed, *budget)
    )]
    DeviceMemory { needed: u64, budget: u64 },
    #[error(
        "the host memory budget is {}, and this run needs at least {}; raise it with --host-memory, or shorten \
         the windows with --seq-len",
        spelt(*budget), at_least(*needed, *budget)
    )]
    HostMemory { needed: u64, budget: u64 },
    #[error(
        "{}: cannot resume from this journal: {reason}; use --restart to start over", path.display()
    )]
    Journal { path: PathBuf, reason: String },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_told_in_the_unit_they_were_given_in() {
        let error = PlanError::HostMemory {
            needed: 140_401_778,
            budget: 120 << 20,
        };
        let line = error.to_string();
        assert!(
            line.contains("budget is 120MiB, and this run needs at least 133.9MiB"),
            "{line}"
        );
    }
}
