//! The one error type of this crate.

use std::path::PathBuf;

use gptq_calibration::CalibrationError;
use gptq_format::FormatError;
use gptq_kernels::DeviceError;
use gptq_model::ModelError;
use thiserror::Error;

/// Why no text comes.
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
    #[error("{}: its logits are not finite; gptq verify tells more", dir.display())]
    NonFiniteLogits { dir: PathBuf },
}
