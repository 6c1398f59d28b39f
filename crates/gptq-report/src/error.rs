//! Errors of this crate.

use std::path::PathBuf;

use gptq_calibration::CalibrationError;
use gptq_format::FormatError;
use thiserror::Error;

/// Reason why a report or a card could not be made.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ReportError {
    #[error(transparent)]
    Format(#[from] FormatError),
    #[error(
        "{}: no report.json here or in a directory below; point at a branch that gptq quantize \
         wrote, or at the directory that holds its branches", dir.display()
    )]
    NoBranches { dir: PathBuf },
    #[error("{}: a second branch is named {name:?}; remove one of the two", dir.display())]
    SameName { dir: PathBuf, name: String },
    #[error(
        "{}: branches of two models, {first:?} and {second:?}; a matrix must have only one", dir.display()
    )]
    TwoModels {
        dir: PathBuf,
        first: String,
        second: String,
    },
    #[error("{repo:?} is not a Hub repository; write it as user/name")]
    Repository { repo: String },
    #[error(
        "{name:?} is neither a prompt template ({known}) nor a file; a file holds the prompt \
         with {{prompt}} where the user's text goes"
    )]
    PromptTemplate { name: String, known: String },
    #[error(
        "{}: the tokenizer has no chat template; choose a prompt template with --prompt-template", dir.display()
    )]
    NoChatTemplate { dir: PathBuf },
    #[error("{}: {source}; choose another template with --prompt-template", dir.display())]
    ChatTemplate {
        dir: PathBuf,
        source: Box<CalibrationError>,
    },
    #[error("{template}: {}", reason(source))]
    Template {
        template: String,
        source: minijinja::Error,
    },
}

/// Summarizes in one line what is wrong, and where in the template.
fn reason(error: &minijinja::Error) -> String {
    let detail = error.detail().map(|d| format!(": {d}"));
    let line = error.line().map(|n| format!(", line {n}"));
    format!(
        "{}{}{}",
        error.kind(),
        detail.unwrap_or_default(),
        line.unwrap_or_default()
    )
}
