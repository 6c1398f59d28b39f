//! Perplexity on a text, as reports of runs and verifications have it.

use serde::{Deserialize, Serialize};

use crate::limits::{MAX_COUNT, MAX_PERPLEXITY, most, within};

/// Perplexity on some text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// File name of the text.
    pub text: String,
    /// Its SHA-256; older files have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_sha256: Option<String>,
    /// Tokens per window.
    pub window: usize,
    /// Tokens scored: all of a full window except the first.
    pub tokens: usize,
    /// Tokens behind the last full window, which are not scored; older files do not say.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left_over: usize,
    /// Perplexity of the branch, or of the model that was measured.
    pub value: f64,
    /// Perplexity of the dense model on the same windows, if it was measured.
    #[serde(default)]
    pub dense: Option<f64>,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl Perplexity {
    /// Checks that its numbers are in the range of measurements.
    ///
    /// # Errors
    /// Describes the first field that is out of range.
    pub fn check(&self) -> Result<(), String> {
        most("perplexity.window", self.window, MAX_COUNT)?;
        most("perplexity.tokens", self.tokens, MAX_COUNT)?;
        within("perplexity.value", self.value, MAX_PERPLEXITY)?;
        within(
            "perplexity.dense",
            self.dense.unwrap_or_default(),
            MAX_PERPLEXITY,
        )
    }
}
