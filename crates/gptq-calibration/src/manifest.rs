//! What a calibration was made of, as a branch's report carries it.

use serde::{Deserialize, Serialize};

use crate::Sampling;
use crate::source::HashedFile;

/// What went into a calibration; names no path of the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The dataset's id, or the name of the file or glob.
    pub source: String,
    /// The dataset's commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Every file of the source; older reports name none.
    #[serde(default)]
    pub files: Vec<HashedFile>,
    /// The range of rows asked for.
    pub rows: String,
    /// Rows used: those left out by `min_tokens` and `dedupe` or for a null do not count, nor those that
    /// consecutive windows did not reach, to the batch.
    pub row_count: usize,
    /// Rows left out because a column they need is null or not there, of those that were reached.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub null_rows: usize,
    /// Rows left out because they hold no text, of those that were reached.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub blank_rows: usize,
    /// Rows in whose text halves of surrogate pairs were replaced by U+FFFD.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub mended_rows: usize,
    /// Positions of rows of token ids that an attention mask dropped.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub masked_tokens: usize,
    /// Rows left out because the chat template objects to them, of those that were reached.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub objected_rows: usize,
    /// The date that the chat template was told, where it asked for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
    /// Least tokens of a row.
    #[serde(default)]
    pub min_tokens: usize,
    /// Whether repeated rows were left out.
    #[serde(default)]
    pub dedupe: bool,
    /// The template, or what else made a row a document.
    pub template: String,
    /// SHA-256 of `tokenizer.json`.
    pub tokenizer_sha256: String,
    /// Tokens in the rows used.
    pub available_tokens: usize,
    /// How windows were taken.
    pub sampling: Sampling,
    /// Seed of the draw.
    pub seed: u64,
    /// Windows drawn.
    pub samples: usize,
    /// Tokens per window.
    pub seq_len: usize,
    /// Positions of the joined rows that lie in at least one window.
    pub unique_tokens: usize,
}

impl Manifest {
    /// What is worth knowing of windows that hold more tokens than the rows: every token is then read several
    /// times, which costs time and adds nothing.
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
