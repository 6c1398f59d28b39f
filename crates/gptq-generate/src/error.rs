//! Errors of this crate.

use std::path::PathBuf;

use gptq_calibration::CalibrationError;
use gptq_format::FormatError;
use gptq_kernels::DeviceError;
use gptq_model::ModelError;
use thiserror::Error;

/// Reason why no text could be generated.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum GenerateError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("{name} = {value} is not {valid}")]
    Setting {
        name: &'static str,
        value: f32,
        valid: &'static str,
    },
    #[error("the prompt has no tokens; give some text")]
    EmptyPrompt,
    #[error("the prompt cannot be read: {source}")]
    Input { source: std::io::Error },
    #[error("{}: the logits are not finite; run gptq verify for details", dir.display())]
    NonFiniteLogits { dir: PathBuf },
}
