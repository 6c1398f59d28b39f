//! `verify.json`: what was checked, what was found, and whether it passed.

use std::collections::BTreeMap;
use std::path::Path;

use gptq_format::{FileDigest, FormatError, read_json, write_json};
use serde::{Deserialize, Serialize};

use crate::Tolerances;

/// The receipt's name in a branch directory.
pub const RECEIPT: &str = "verify.json";

/// A judgement of one directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Receipt {
    /// Every check passed.
    pub pass: bool,
    /// Version of the program that judged.
    pub gptq_version: String,
    /// Every file of the directory but the receipt, by name.
    pub files: BTreeMap<String, FileDigest>,
    /// In the order they were made.
    pub checks: Vec<Check>,
    /// What was tolerated.
    pub tolerances: Tolerances,
    /// On the evaluation text, if one was given.
    pub perplexity: Option<Perplexity>,
    /// Mean over tokens of `Σ p ln(p / q)`, `p` the dense model's next-token probabilities and `q`
    /// the branch's.
    pub kl_divergence: Option<f64>,
    /// Fraction of tokens after which both find the same token the most likely.
    pub top1_agreement: Option<f64>,
    /// Of each block, given the dense model's inputs; empty without the dense model.
    pub blocks: Vec<BlockError>,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was checked, in a word or two.
    pub name: String,
    /// Whether it held.
    pub pass: bool,
    /// What was found.
    pub detail: String,
}

/// Perplexity on some text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// File name of the text.
    pub text: String,
    /// Tokens per window.
    pub window: usize,
    /// Tokens scored: all of a full window but its first.
    pub tokens: usize,
    /// Tokens behind the last full window, which are not scored; older receipts do not say.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left_over: usize,
    /// Of the judged directory.
    pub value: f64,
    /// Of the dense model on the same windows.
    pub dense: Option<f64>,
}

/// What one block does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockError {
    /// Its index.
    pub layer: usize,
    /// `‖B̂(x) - B(x)‖² / ‖B(x) - x‖²` over the text, `B` the dense block, `B̂` the judged one, `x` the
    /// dense model's hidden states before it.
    pub relative_error: f64,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// Those of `checks` that failed, in a sentence each.
pub fn failures(checks: &[Check]) -> Vec<String> {
    let failed = checks.iter().filter(|check| !check.pass);
    failed
        .map(|check| format!("{}: {}", check.name, check.detail))
        .collect()
}

impl Receipt {
    /// The receipt in `dir`; `None` where there is none.
    ///
    /// # Errors
    /// A receipt that cannot be read.
    pub fn read(dir: &Path) -> Result<Option<Self>, FormatError> {
        let path = dir.join(RECEIPT);
        match path.exists() {
            true => read_json(&path).map(Some),
            false => Ok(None),
        }
    }

    /// Writes it into `dir`.
    ///
    /// # Errors
    /// A directory that cannot be written to.
    pub fn write(&self, dir: &Path) -> Result<(), FormatError> {
        write_json(&dir.join(RECEIPT), self)
    }

    /// The checks that failed, in a sentence each.
    pub fn failures(&self) -> Vec<String> {
        failures(&self.checks)
    }
}
