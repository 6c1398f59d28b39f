//! Errors of this crate.

use std::path::PathBuf;

use gptq_format::{FormatError, FormatName, Refusal};
use gptq_spec::SpecError;
use thiserror::Error;

/// Reason why a branch cannot be exported.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ExportError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(
        "{}: not quantized, so there is nothing to export; quantize it with gptq quantize first", dir.display()
    )]
    Dense { dir: PathBuf },
    #[error("{}: already has the format {format}; choose another one", dir.display())]
    Same { dir: PathBuf, format: FormatName },
    #[error("{}: {reason}", dir.display())]
    Gguf { dir: PathBuf, reason: String },
    #[error("{}: {reason}", dir.display())]
    Tokenizer { dir: PathBuf, reason: String },
    #[error("{}: exists already; remove it, or choose another file with --output", path.display())]
    Exists { path: PathBuf },
    #[error("{}: {module} does not fit {format}: {refusal}", dir.display())]
    DoesNotFit {
        dir: PathBuf,
        module: String,
        format: FormatName,
        refusal: Refusal,
    },
}
