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
    /// Rows left out because a column they need is null, of those that were reached.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub null_rows: usize,
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

fn is_zero(count: &usize) -> bool {
    *count == 0
}
