//! Evaluation text for perplexity.
//!
//! | file | documents |
//! |---|---|
//! | `.json`, `.jsonl`, `.csv`, `.parquet`, `.arrow` | each row's column `text`; in JSON, an element that is a text |
//! | `.txt`, and any other extension, such as `.md` | the whole file is one |
//!
//! The formats of the first row may be compressed (`.gz`, `.zst`), and so may `.txt`. Rows whose
//! text is missing, null or blank are skipped, as in calibration.

use std::fs::File;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;

use crate::reader;
use crate::row::{Reading, TEXT};
use crate::source_file::{Compression, RowFormat, SourceFile, format};
use crate::value::Value;
use crate::{CalibrationError, TextTokenizer};

/// Maximum size of a text, as decompressed: some 16 million tokens; measurements use a million at
/// most.
const MAX_TEXT: u64 = 64 << 20;

/// Amount of text read for a first look.
const FIRST_LOOK: u64 = 2 << 20;

/// An evaluation text as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvaluationText {
    /// The documents' tokens, joined.
    pub tokens: Vec<u32>,
    /// Tokens per window.
    pub window: usize,
    /// Number of documents.
    pub documents: usize,
    /// Number of rows skipped because they hold no text.
    pub rows_left_out: usize,
    /// Number of documents in which unpaired surrogates were replaced by U+FFFD.
    pub mended: usize,
    /// True if this is the complete text.
    pub is_whole: bool,
}

impl EvaluationText {
    /// Reads `path`, whose format determines the documents. It may be shorter than a window.
    ///
    /// # Errors
    /// A file that cannot be read, is malformed, has no text in the column `text`, or is over 64
    /// MiB.
    pub fn read(
        path: &Path,
        tokenizer: &TextTokenizer,
        window: usize,
    ) -> Result<Self, CalibrationError> {
        EvaluationText::up_to(u64::MAX, path, tokenizer, window)
    }

    /// Reads enough of `path` to determine whether it can be used for evaluation.
    ///
    /// # Errors
    /// Those of [`EvaluationText::read`], and a text shorter than a window.
    pub fn first_look(
        path: &Path,
        tokenizer: &TextTokenizer,
        window: usize,
    ) -> Result<Self, CalibrationError> {
        let text = EvaluationText::up_to(FIRST_LOOK, path, tokenizer, window)?;
        match text.is_whole || text.tokens.len() >= window {
            true => text.filled(path),
            false => evaluation_tokens(path, tokenizer, window),
        }
    }

    fn up_to(
        enough: u64,
        path: &Path,
        tokenizer: &TextTokenizer,
        window: usize,
    ) -> Result<Self, CalibrationError> {
        if window < 2 {
            return Err(CalibrationError::Window { window });
        }
        let texts = read_texts(path, enough)?;
        Ok(EvaluationText {
            documents: texts.texts.len(),
            rows_left_out: texts.left_out,
            mended: texts.mended,
            is_whole: texts.is_whole,
            tokens: tokenizer.join(texts.texts)?,
            window,
        })
    }

    fn filled(self, path: &Path) -> Result<Self, CalibrationError> {
        match self.tokens.len() < self.window {
            true => Err(CalibrationError::TooLittleEvaluation {
                path: path.into(),
                available: self.tokens.len(),
                window: self.window,
            }),
            false => Ok(self),
        }
    }

    /// Returns the full windows. Tokens after the last one are not scored.
    pub fn windows(&self) -> impl Iterator<Item = &[u32]> {
        self.tokens.chunks_exact(self.window)
    }

    /// Returns the number of scored tokens: all of a window except the first.
    pub fn scored(&self) -> usize {
        self.tokens.len() / self.window * (self.window - 1)
    }

    /// Returns the number of tokens after the last full window.
    pub fn left_over(&self) -> usize {
        self.tokens.len() % self.window
    }

    /// Returns warnings about the text, one line each.
    pub fn warnings(&self) -> Vec<String> {
        let rows = match self.rows_left_out {
            0 => None,
            rows => Some(format!(
                "{rows} rows of the evaluation text are empty and were skipped"
            )),
        };
        let mended = match self.mended {
            0 => None,
            documents => Some(format!(
                "{documents} documents of the evaluation text contain unpaired surrogates; each was replaced by U+FFFD"
            )),
        };
        let all = [rows, mended, self.left_over_warning()];
        all.into_iter().flatten().collect()
    }

    /// Warns if a considerable part of the text fills no window.
    fn left_over_warning(&self) -> Option<String> {
        let (tokens, window) = (self.tokens.len(), self.window);
        // A twentieth makes little difference.
        if !self.is_whole || 20 * self.left_over() < tokens || tokens < window {
            return None;
        }
        let shorter = tokens / tokens.div_ceil(window);
        let scored = tokens / shorter * (shorter - 1);
        Some(format!(
            "{} of the evaluation text's {tokens} tokens are scored: {} after the last full window of {window} are \
             left out; windows of {shorter} would score {scored} (--window {shorter}, or window = {shorter} under \
             [evaluation]), but perplexities on different windows are not comparable",
            self.scored(),
            self.left_over()
        ))
    }
}

/// Reads an evaluation text that fills at least one window.
///
/// # Errors
/// Those of [`EvaluationText::read`], and a text shorter than a window.
pub fn evaluation_tokens(
    path: &Path,
    tokenizer: &TextTokenizer,
    window: usize,
) -> Result<EvaluationText, CalibrationError> {
    EvaluationText::read(path, tokenizer, window)?.filled(path)
}

/// Documents for evaluation, and counts of the rest.
#[derive(Debug, Default)]
struct Texts {
    texts: Vec<String>,
    left_out: usize,
    mended: usize,
    is_whole: bool,
}

/// Reads documents until there are `enough` bytes of them.
fn read_texts(path: &Path, enough: u64) -> Result<Texts, CalibrationError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (format, compression) = format(&name).unwrap_or((RowFormat::Text, Compression::None));
    let file = SourceFile {
        name: name.into_owned(),
        path: path.into(),
        format,
        compression,
    };
    let texts = match format {
        RowFormat::Text => plain(&file, MAX_TEXT, enough)?,
        _ => column(&file, MAX_TEXT, enough)?,
    };
    match texts.texts.is_empty() {
        true => Err(CalibrationError::NoEvaluation {
            path: path.into(),
            rows: texts.left_out,
        }),
        false => Ok(texts),
    }
}

/// Reads the whole file as one document.
fn plain(file: &SourceFile, limit: u64, enough: u64) -> Result<Texts, CalibrationError> {
    let opened = File::open(&file.path).map_err(CalibrationError::io(&file.path))?;
    let mut bytes = Vec::new();
    reader::decompress(opened, file)?
        .take((limit + 1).min(enough))
        .read_to_end(&mut bytes)
        .map_err(CalibrationError::io(&file.path))?;
    within(bytes.len() as u64, limit, file)?;
    let is_whole = (bytes.len() as u64) < enough;
    let cut = |bytes: &[u8]| match std::str::from_utf8(bytes) {
        // A partial read may end within a character.
        Err(e) if !is_whole && e.error_len().is_none() => e.valid_up_to(),
        _ => bytes.len(),
    };
    bytes.truncate(cut(&bytes));
    let text = String::from_utf8(bytes).map_err(|_| {
        let reason = "not UTF-8 text; name a compressed text .txt.gz or .txt.zst";
        file.malformed(reason)
    })?;
    let is_blank = text.trim().is_empty();
    Ok(Texts {
        texts: Vec::from_iter((!is_blank).then_some(text)),
        left_out: usize::from(is_blank),
        mended: 0,
        is_whole,
    })
}

/// Reads the texts in the column `text`.
fn column(file: &SourceFile, limit: u64, enough: u64) -> Result<Texts, CalibrationError> {
    let mut found = Texts::default();
    let (mut bytes, mut rows, mut is_cut) = (0, 0, false);
    // Columns of the first row, until a row has the needed one.
    let mut lacking: Option<Vec<String>> = None;
    let lacks = |columns: Vec<String>| CalibrationError::EvaluationColumn {
        path: file.path.clone(),
        columns,
    };
    let reading = Reading::of(&[TEXT]);
    let read = reader::read(file, &reading, &mut |mut row| {
        let mended = reading.mended.take();
        if bytes >= enough {
            is_cut = true;
            return Ok(ControlFlow::Break(()));
        }
        let has_text = row.contains_key(TEXT);
        match row.swap_remove(TEXT) {
            Some(Value::String(text)) if !text.trim().is_empty() => {
                bytes += text.len() as u64;
                within(bytes, limit, file)?;
                let is_mended = mended > 0 && text.contains(char::REPLACEMENT_CHARACTER);
                found.mended += usize::from(is_mended);
                found.texts.push(text);
            }
            Some(Value::String(_) | Value::Null) | None => found.left_out += 1,
            Some(_) => {
                let reason = format!("row {rows}: {TEXT:?} is not a text");
                return Err(file.malformed(reason));
            }
        }
        match (has_text, rows) {
            (true, _) => lacking = None,
            (false, 0) => lacking = Some(row.keys().cloned().collect()),
            (false, _) => {}
        }
        rows += 1;
        Ok(ControlFlow::Continue(()))
    });
    found.is_whole = !is_cut;
    match (read, lacking) {
        (Ok(_), Some(columns)) => Err(lacks(columns)),
        (Ok(_), None) => Ok(found),
        (Err(error), _) => {
            let found: &CalibrationError = match &error {
                CalibrationError::InFile { source, .. } => source,
                other => other,
            };
            // Columnar files report a missing column at once.
            let columns = match found {
                CalibrationError::Column { columns, .. } => Some(columns.clone()),
                _ => None,
            };
            Err(columns.map_or(error, lacks))
        }
    }
}

fn within(bytes: u64, limit: u64, file: &SourceFile) -> Result<(), CalibrationError> {
    match bytes > limit {
        true => Err(file.malformed(format!(
            "over the limit of {limit} bytes for an evaluation text; use a part of it"
        ))),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests;
