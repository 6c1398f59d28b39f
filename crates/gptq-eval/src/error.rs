//! Errors of this crate.

use std::path::{Path, PathBuf};

use gptq_calibration::CalibrationError;
use gptq_format::FormatError;
use thiserror::Error;

/// Reason why a task cannot be read, or put to a model.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum EvalError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    #[error("{}: {place}, {key:?}: {reason}", path.display())]
    Row {
        path: PathBuf,
        /// Row, line or key of the question.
        place: String,
        key: String,
        reason: String,
    },
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("the template {reason}")]
    Template { reason: String },
    #[error(
        "{shots} shots need as many rows besides the question itself, and {} has {available}; use --shots {available} \
         or another --shots-from", path.display()
    )]
    TooFewShots {
        path: PathBuf,
        shots: usize,
        available: usize,
    },
    #[error(
        "{shots} shots need rows to take them from, with known answers and not those of the task: give --shots-from FILE"
    )]
    NoShots { shots: usize },
    #[error(
        "{}: {place}: the choice {choice:?}... has {tokens} tokens, more than the {context} that the model takes",
        path.display()
    )]
    LongChoice {
        path: PathBuf,
        place: String,
        choice: String,
        tokens: usize,
        context: usize,
    },
    #[error(
        "{}: {place}: the prompt has no tokens, and the tokenizer has neither a bos_token nor an eos_token to stand for them",
        path.display()
    )]
    NoPrompt { path: PathBuf, place: String },
}

impl EvalError {
    /// Makes the error of a row's key.
    pub(crate) fn row(path: &Path, place: &str, key: &str, reason: impl Into<String>) -> Self {
        EvalError::Row {
            path: path.into(),
            place: place.to_owned(),
            key: key.to_owned(),
            reason: reason.into(),
        }
    }

    /// Makes the error of a whole file.
    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        EvalError::File {
            path: path.into(),
            reason: reason.into(),
        }
    }
}
