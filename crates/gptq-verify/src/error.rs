//! Errors of this crate.

use std::path::PathBuf;

use gptq_calibration::CalibrationError;
use gptq_format::FormatError;
use gptq_kernels::DeviceError;
use gptq_model::ModelError;
use gptq_spec::SpecError;
use thiserror::Error;

/// Reason why a directory cannot be verified or fails.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum VerifyError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(
        "{}: quantize_config.json and config.json's quantization_config disagree; clients read \
         one or the other", dir.display()
    )]
    ConfigsDisagree { dir: PathBuf },
    #[error("{module}: scale [{group}, {output}] is 0: its weights are lost")]
    Scale {
        module: String,
        group: usize,
        output: usize,
    },
    #[error("{}: the output is not finite on the evaluation text", dir.display())]
    NonFiniteOutput { dir: PathBuf },
    #[error(
        "{} differs in shape from {}; compare a branch with the model it was quantized from",
        dense.display(), dir.display()
    )]
    OtherModel { dir: PathBuf, dense: PathBuf },
    #[error("a window of {window} tokens leaves nothing to score; use at least 2")]
    Window { window: usize },
}
