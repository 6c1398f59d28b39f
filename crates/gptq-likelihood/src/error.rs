//! Errors of this crate.

use std::path::PathBuf;

use gptq_kernels::DeviceError;
use gptq_model::ModelError;
use thiserror::Error;

/// Reason why a model gives no log-likelihoods.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum LikelihoodError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("{}: the output is not finite; run gptq verify for details", dir.display())]
    NonFinite { dir: PathBuf },
}
