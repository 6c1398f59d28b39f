//! Errors of this crate.

use gptq_format::FormatError;
use gptq_spec::SpecError;
use thiserror::Error;

/// Reason why a model cannot be loaded or run.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ModelError {
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(
        "token {id} is outside the model's vocabulary of {vocabulary}; the tokenizer belongs to \
         another model"
    )]
    TokenOutOfRange { id: u32, vocabulary: usize },
}
