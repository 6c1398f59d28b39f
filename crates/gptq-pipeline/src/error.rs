//! The one error type of this crate.

use gptq_calibration::CalibrationError;
use gptq_format::FormatError;
use gptq_kernels::DeviceError;
use gptq_model::ModelError;
use gptq_solver::SolverError;
use thiserror::Error;

use crate::RecipeError;

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
    #[error("branch {branch}, {modules}: {source}")]
    Solver {
        branch: String,
        modules: String,
        source: SolverError,
    },
}
