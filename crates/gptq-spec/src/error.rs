//! Errors of this crate.

use std::path::PathBuf;

use gptq_format::FormatError;
use thiserror::Error;

/// Reasons that a model cannot be described, or that a checkpoint does not hold it.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum SpecError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error("{}: {reason}", path.display())]
    Config { path: PathBuf, reason: String },
    #[error("{}: {reason}", dir.display())]
    Census { dir: PathBuf, reason: String },
}
