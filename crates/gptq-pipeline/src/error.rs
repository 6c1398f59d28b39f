//! The one error type of this crate.

use gptq_calibration::CalibrationError;
use gptq_format::FormatError;
use gptq_kernels::{DeviceError, SolveError};
use gptq_model::ModelError;
use thiserror::Error;

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
        "the device memory budget is {budget} bytes, and this run needs at least {needed}; give \
         more with --device-memory, shorten the windows with --seq-len, or use --device cpu"
    )]
    DeviceMemory { needed: u64, budget: u64 },
    #[error(
        "{source}, with a budget of {budget} bytes; a smaller --device-memory keeps more hidden \
         states on the host"
    )]
    OutOfDeviceMemory { source: DeviceError, budget: u64 },
    #[error("branch {branch}, {modules}: {source}")]
    Solver {
        branch: String,
        modules: String,
        source: Box<SolveError>,
    },
    #[error("branch {branch}, {modules}: {source}")]
    HiddenStates {
        branch: String,
        modules: String,
        source: Overflow,
    },
    #[error(
        "branch {branch}, {modules}: the Hessian is not positive definite below damping {needed}, and \
         [numerics] max_damping is {most}; use more calibration tokens or allow more"
    )]
    Damping {
        branch: String,
        modules: String,
        needed: f64,
        most: f64,
    },
}
