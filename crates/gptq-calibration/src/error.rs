//! Errors of this crate.

use std::path::{Path, PathBuf};

use thiserror::Error;

/// Reason why calibration or evaluation text cannot be used.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum CalibrationError {
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{}: {reason}", path.display())]
    Malformed { path: PathBuf, reason: String },
    #[error(
        "{}: not a supported format of rows; supported are .json, .jsonl, .parquet, .arrow, \
         .csv and .txt, each also as .gz or .zst",
        path.display()
    )]
    UnknownFormat { path: PathBuf },
    #[error(
        "{}: temporary text cannot be written: {source}; set TMPDIR, or a run's --scratch, to a directory that has \
         space",
        tempfile::env::temp_dir().display()
    )]
    Scratch { source: std::io::Error },
    #[error(
        "row {row} has no column {column:?}; its columns are {}; choose with template, column, \
         messages or tokens",
        columns.join(", ")
    )]
    Column {
        row: usize,
        column: String,
        columns: Vec<String>,
    },
    #[error(
        "row {row}, column {column:?}: {found}; {takes}: convert the column, leave the row out with \
         rows, or choose with template, column, messages or tokens"
    )]
    Cell {
        row: usize,
        column: String,
        found: String,
        takes: &'static str,
    },
    #[error(
        "all {rows} rows of the range {range} have a null in {}; the columns are {}; choose with \
         template, column, messages or tokens",
        wanted.join(" or "), columns.join(", ")
    )]
    Nulls {
        rows: usize,
        range: String,
        wanted: Vec<String>,
        columns: Vec<String>,
    },
    #[error(
        "all {rows} rows of the range {range} have no text in {}; the columns are {}; choose with \
         template, column, messages or tokens",
        wanted.join(" and "), columns.join(", ")
    )]
    NoText {
        rows: usize,
        range: String,
        wanted: Vec<String>,
        columns: Vec<String>,
    },
    #[error("{}: {source}", path.display())]
    InFile {
        path: PathBuf,
        source: Box<CalibrationError>,
    },
    #[error("the tokenizer has no chat template; chat_template = \"chatml\" uses ChatML")]
    NoChatTemplate,
    #[error("template {template:?}: {reason}")]
    Template { template: String, reason: String },
    #[error("rows = {text:?} is not a range like \"0:1000\"")]
    Rows { text: String },
    #[error("rows {range} selects none of the {available} rows")]
    NoRows { range: String, available: usize },
    #[error(
        "too little calibration text: {available} tokens, but {samples} window(s) of {seq_len} need \
         {needed}; use more rows, at most {fit} sample(s), or a seq_len of at most {fit_len}"
    )]
    TooLittleText {
        available: usize,
        samples: usize,
        seq_len: usize,
        needed: usize,
        fit: usize,
        fit_len: usize,
    },
    #[error(
        "{}: too little evaluation text: its {available} tokens do not fill one window of {window}; the largest \
         that fits is {available}: --window {available}, or window = {available} under [evaluation]",
        path.display()
    )]
    TooLittleEvaluation {
        path: PathBuf,
        available: usize,
        window: usize,
    },
    #[error(
        "{}: this file is used for calibration; measure perplexity on other text", path.display()
    )]
    CalibratedOn { path: PathBuf },
    #[error("windows of {window} tokens leave nothing to score; use at least 2")]
    Window { window: usize },
    #[error(
        "{}: no text to evaluate on: none of the {rows} rows has text in the column \"text\"", path.display()
    )]
    NoEvaluation { path: PathBuf, rows: usize },
    #[error(
        "{}: token {token:?} has the id {id}, beyond the model's vocabulary of {vocabulary}; resize the \
         model's embedding, or remove the token from tokenizer_config.json, special_tokens_map.json or \
         added_tokens.json",
        dir.display()
    )]
    BeyondVocabulary {
        dir: PathBuf,
        token: String,
        id: u32,
        vocabulary: u32,
    },
    #[error(
        "{}: no column \"text\", which evaluation needs; its columns are {}; rename one, or \
         give a JSON list of texts or a plain text",
        path.display(),
        columns.join(", ")
    )]
    EvaluationColumn { path: PathBuf, columns: Vec<String> },
    #[error(
        "{}: no end token; neither tokenizer_config.json nor special_tokens_map.json has an eos_token \
         in the vocabulary; add one to tokenizer_config.json",
        dir.display()
    )]
    NoEndToken { dir: PathBuf },
    #[error(
        "{0}: {found}, but no tokenizer.json; create it with Transformers: python -c \"from \
         transformers import AutoTokenizer; AutoTokenizer.from_pretrained('{0}').save_pretrained('{0}')\"",
        dir.display()
    )]
    SlowTokenizer { dir: PathBuf, found: &'static str },
    #[error("{template}{}: {reason}", at_line(*line))]
    ChatTemplate {
        template: String,
        line: usize,
        reason: String,
    },
    #[error("row {row}: {source}")]
    InRow {
        row: usize,
        source: Box<CalibrationError>,
    },
    #[error("the chat template refuses all {rows} rows of the range {range}; the first: {source}")]
    Objections {
        rows: usize,
        range: String,
        source: Box<CalibrationError>,
    },
    #[error("date = {text:?} is not a date like \"2026-11-30\" or \"2026-11-30T08:15:00\"")]
    Date { text: String },
    #[error("the tokenizer failed: {reason}")]
    Tokenizer { reason: String },
}

fn at_line(line: usize) -> String {
    match line {
        0 => String::new(),
        line => format!(", line {line}"),
    }
}

impl CalibrationError {
    /// Makes the error of a failed tokenizer.
    pub(crate) fn tokenizer(error: tokenizers::Error) -> Self {
        CalibrationError::Tokenizer {
            reason: error.to_string(),
        }
    }

    pub(crate) fn is_missing_file(&self) -> bool {
        matches!(self, CalibrationError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    }

    /// Returns true for a chat template's refusal of a conversation, as opposed to a fault of the
    /// row or file.
    pub(crate) fn is_objection(&self) -> bool {
        match self {
            CalibrationError::InFile { source, .. } | CalibrationError::InRow { source, .. } => {
                source.is_objection()
            }
            CalibrationError::ChatTemplate { .. } => true,
            _ => false,
        }
    }

    /// Adds the number of the row to an error.
    pub(crate) fn in_row(row: usize) -> impl FnOnce(Self) -> Self {
        move |source| CalibrationError::InRow {
            row,
            source: source.into(),
        }
    }

    /// Adds the file of a row to an error.
    pub(crate) fn in_file(path: &Path) -> impl FnOnce(Self) -> Self {
        move |source| CalibrationError::InFile {
            path: path.into(),
            source: source.into(),
        }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| CalibrationError::Io { path, source }
    }
}
