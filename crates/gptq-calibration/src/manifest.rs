//! Record of a calibration, as included in a branch's report.

use serde::{Deserialize, Serialize};

use crate::Sampling;
use crate::source_file::HashedFile;

/// Inputs of a calibration; without local paths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Dataset id, or name of the file or glob.
    pub source: String,
    /// Commit of the dataset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Files of the source; empty in older reports.
    #[serde(default)]
    pub files: Vec<HashedFile>,
    /// Requested range of rows.
    pub rows: String,
    /// Rows used, without those skipped by `min_tokens` and `dedupe` or for a null, and without
    /// those that consecutive windows did not reach (counted in whole batches).
    pub row_count: usize,
    /// Rows skipped because a needed column is null or missing, of those that were reached.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub null_rows: usize,
    /// Rows skipped because they hold no text, of those that were reached.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub blank_rows: usize,
    /// Rows in which unpaired surrogates were replaced by U+FFFD.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub mended_rows: usize,
    /// Positions of token-id rows that an attention mask removed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub masked_tokens: usize,
    /// Rows skipped because the chat template refused them, of those that were reached.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub objected_rows: usize,
    /// Date that the chat template saw, if it asked for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
    /// Minimum number of tokens of a row.
    #[serde(default)]
    pub min_tokens: usize,
    /// True if repeated rows were skipped.
    #[serde(default)]
    pub dedupe: bool,
    /// Template, or other conversion of a row to a document.
    pub template: String,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// Tokens in the rows used.
    pub available_tokens: usize,
    /// Selection of windows.
    pub sampling: Sampling,
    /// Seed of the draw.
    pub seed: u64,
    /// Number of windows drawn.
    pub samples: usize,
    /// Tokens per window.
    pub seq_len: usize,
    /// Positions of the joined rows that are in at least one window.
    pub unique_tokens: usize,
}

impl Manifest {
    /// Warns if the windows hold more tokens than the rows: then every token is read several times,
    /// which costs time without benefit.
    pub fn repetition_warning(&self) -> Option<String> {
        let read = self.samples * self.seq_len;
        if read <= self.available_tokens || self.unique_tokens == 0 {
            return None;
        }
        let times = read as f64 / self.unique_tokens as f64;
        let enough = (self.available_tokens / self.seq_len).max(1);
        Some(format!(
            "{} windows of {} tokens are more than the {} tokens of the calibration text: each token is read {times:.1} \
             times; {enough} {} would read each once",
            self.samples,
            self.seq_len,
            self.available_tokens,
            if enough == 1 { "window" } else { "windows" }
        ))
    }
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}
