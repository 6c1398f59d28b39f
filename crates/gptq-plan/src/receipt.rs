//! The verification report `verify.json`: the checks, their findings, and whether all passed.

use std::collections::BTreeMap;
use std::path::Path;

use gptq_format::{FileDigest, FormatError, read_json, write_json};
use serde::{Deserialize, Serialize};

use crate::Perplexity;
use crate::limits::{MAX_LAYERS, below, most, number};

/// File name of the verification report in a branch directory.
pub const RECEIPT: &str = "verify.json";

/// The verification of one directory. Fields that older receipts lack are empty.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Receipt {
    /// Every check passed.
    pub pass: bool,
    /// Version of the program that verified.
    pub gptq_version: String,
    /// Every file of the directory except the report itself and the answers to tasks, by name.
    pub files: BTreeMap<String, FileDigest>,
    /// The checks in the order they were made.
    pub checks: Vec<Check>,
    /// Depth of the verification; absent in older reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<Depth>,
    /// Tolerances applied.
    pub tolerances: Tolerances,
    /// Perplexity on the evaluation text, if one was given and the output is finite.
    pub perplexity: Option<Perplexity>,
    /// Largest values of the forward pass against the range of f16; absent in older reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<F16Range>,
    /// Round-to-nearest baseline with the same settings, which the tolerances are based on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nearest: Option<NearestRounding>,
    /// One line on where the loss is largest and how to reduce it, if it is considerable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
    /// Mean over tokens of `Σ p ln(p / q)`, `p` the dense model's next-token probabilities and `q`
    /// the branch's.
    pub kl_divergence: Option<f64>,
    /// Fraction of tokens where both have the same most likely next token.
    pub top1_agreement: Option<f64>,
    /// Error of each block, given the dense model's inputs; empty without the dense model.
    pub blocks: Vec<BlockError>,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// Name of the check.
    pub name: String,
    /// True if it passed.
    pub pass: bool,
    /// Result in words.
    pub detail: String,
}

impl Check {
    /// Records a check and its result in words.
    pub fn new(name: &str, pass: bool, detail: String) -> Check {
        Check {
            name: name.into(),
            pass,
            detail,
        }
    }
}

/// Depth of a verification, from less to more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Depth {
    /// Only the files were checked.
    Files,
    /// The model was run on a text.
    Text,
    /// The model was run on a text beside the dense model.
    Beside,
}

/// Largest accepted distance between a branch and its dense model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tolerances {
    /// Perplexity increase over the dense model, as a fraction.
    pub perplexity_increase: f64,
    /// Mean KL divergence, nats per token.
    pub kl_divergence: f64,
    /// Minimum fraction of tokens with the same most likely next token.
    pub top1_agreement: f64,
    /// Relative error of a block: the tolerance of the block that comes closest to its own.
    pub block_error: f64,
}

/// Largest magnitudes of the forward pass, and values beyond the range of f16.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct F16Range {
    /// Largest magnitude that f16 can hold.
    pub largest: f64,
    /// Place of that value.
    pub at: String,
    /// Values beyond the range, in the order of the forward pass.
    pub overflows: Vec<F16Overflow>,
}

/// Values of one kind, in one place, that are beyond f16's range.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct F16Overflow {
    /// Block index; `None` for the logits.
    pub layer: Option<usize>,
    /// Kind of value, such as "attention scores before scaling".
    pub what: String,
    /// Number of such values.
    pub values: u64,
    /// Largest magnitude; `None` if it was computed in 16 bits, as an infinity.
    pub largest: Option<f64>,
    /// True if the dense model also overflows there; `None` if unknown.
    pub dense: Option<bool>,
}

/// Loss of the round-to-nearest baseline, measured on a share of the text.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct NearestRounding {
    /// Tokens scored.
    pub tokens: usize,
    /// Perplexity increase over the dense model, as a fraction; absent if it is not finite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity_increase: Option<f64>,
    /// Mean KL divergence from the dense model, nats per token; absent if it is not finite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_divergence: Option<f64>,
    /// Fraction of tokens where both have the same most likely next token.
    pub top1_agreement: f64,
}

/// Error of one block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockError {
    /// Block index.
    pub layer: usize,
    /// `‖B̂(x) - B(x)‖² / ‖B(x) - x‖²` over the text, `B` the dense block, `B̂` the verified one,
    /// `x` the dense model's hidden states before it. Absent if undefined, with the cause in
    /// `reason`; null in older reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relative_error: Option<f64>,
    /// The same for the dense block rounded to nearest, on its share of the text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nearest_error: Option<f64>,
    /// Reason why there is no relative error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl BlockError {
    /// Computes the error from `‖B̂(x) - B(x)‖²` and `‖B(x) - x‖²`, and the same for the rounded
    /// block.
    pub fn new(layer: usize, [found, whole]: [f64; 2], [nearest, share]: [f64; 2]) -> BlockError {
        let relative = |error: f64, whole: f64| {
            let quotient = (whole > 0.0).then(|| error / whole);
            quotient.filter(|quotient| quotient.is_finite())
        };
        let relative_error = relative(found, whole);
        let reason = match (found, whole) {
            _ if relative_error.is_some() => None,
            (0.0, 0.0) => Some(DOES_NOTHING),
            (found, 0.0) if found.is_finite() => Some(SHOULD_DO_NOTHING),
            _ => Some(NOT_FINITE),
        };
        BlockError {
            layer,
            relative_error,
            nearest_error: relative(nearest, share),
            reason: reason.map(str::to_owned),
        }
    }

    /// Returns true if both the dense block and this one add nothing to their input, which is
    /// correct.
    pub fn does_nothing(&self) -> bool {
        self.reason.as_deref() == Some(DOES_NOTHING)
    }
}

const DOES_NOTHING: &str = "the dense block adds nothing to its input, nor does this one";
const SHOULD_DO_NOTHING: &str = "the dense block adds nothing to its input, and this one does";
const NOT_FINITE: &str = "its output is not finite";

/// Describes the failed ones of `checks`, one sentence each.
pub fn failures(checks: &[Check]) -> Vec<String> {
    let failed = checks.iter().filter(|check| !check.pass);
    failed
        .map(|check| format!("{}: {}", check.name, check.detail))
        .collect()
}

impl Receipt {
    /// Reads the verification report in `dir`; `None` if there is none.
    ///
    /// # Errors
    /// A receipt that cannot be read, or has a number that nothing measured can be: it names the field.
    pub fn read(dir: &Path) -> Result<Option<Self>, FormatError> {
        let path = dir.join(RECEIPT);
        if !path.exists() {
            return Ok(None);
        }
        let receipt: Receipt = read_json(&path)?;
        match receipt.check() {
            Ok(()) => Ok(Some(receipt)),
            Err(reason) => Err(FormatError::Malformed { path, reason }),
        }
    }

    /// Writes the report into `dir`.
    ///
    /// # Errors
    /// A directory that cannot be written to.
    pub fn write(&self, dir: &Path) -> Result<(), FormatError> {
        write_json(&dir.join(RECEIPT), self)
    }

    /// Checks that its numbers are within their limits.
    ///
    /// # Errors
    /// Describes the first field that is out of range.
    fn check(&self) -> Result<(), String> {
        if let Some(measured) = &self.perplexity {
            measured.check()?;
        }
        number("kl_divergence", self.kl_divergence.unwrap_or_default())?;
        number("top1_agreement", self.top1_agreement.unwrap_or_default())?;
        most("blocks", self.blocks.len(), MAX_LAYERS)?;
        for (i, block) in self.blocks.iter().enumerate() {
            below(&format!("blocks[{i}].layer"), block.layer, MAX_LAYERS)?;
            let error = block.relative_error.unwrap_or_default();
            number(&format!("blocks[{i}].relative_error"), error)?;
        }
        Ok(())
    }

    /// Returns the depth of the verification.
    pub fn depth(&self) -> Depth {
        self.depth
            .unwrap_or(match (self.kl_divergence, &self.perplexity) {
                (Some(_), _) => Depth::Beside,
                (None, Some(_)) => Depth::Text,
                (None, None) => Depth::Files,
            })
    }

    /// Returns the report to keep, given the previous one: if the model files are the same and this
    /// verification passed, a deeper previous one keeps its numbers and its result. The second
    /// value is true if the previous one is kept.
    pub fn standing(&self, before: Option<Receipt>) -> (Receipt, bool) {
        let before = before.filter(|before| {
            let judged = |receipt: &Receipt| {
                let files = receipt.files.iter().filter(|(name, _)| is_judged(name));
                files
                    .map(|(name, digest)| (name.clone(), digest.clone()))
                    .collect::<BTreeMap<_, _>>()
            };
            self.pass && self.depth() < before.depth() && judged(self) == judged(before)
        });
        match before {
            Some(before) => {
                // Files that are not verified, such as a card, may have changed.
                let files = self.files.clone();
                (Receipt { files, ..before }, true)
            }
            None => (self.clone(), false),
        }
    }

    /// Describes the failed checks, one sentence each.
    pub fn failures(&self) -> Vec<String> {
        failures(&self.checks)
    }
}

/// Returns true for files that verification depends on: weights, configs and tokenizer, but not
/// documents and reports.
fn is_judged(name: &str) -> bool {
    let kinds = [".safetensors", ".bin", ".pt", ".json", ".model", ".txt"];
    kinds.iter().any(|kind| name.ends_with(kind)) && !name.starts_with("report") && !is_notice(name)
}

/// Returns true for documents.
fn is_notice(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["license", "licence", "notice", "readme"]
        .iter()
        .any(|word| name.starts_with(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt(pass: bool, depth: Depth, weights: &str) -> Receipt {
        let digest = |sha256: &str| FileDigest {
            bytes: 1,
            sha256: sha256.into(),
        };
        Receipt {
            pass,
            gptq_version: String::new(),
            files: [("model.safetensors", weights), ("README.md", weights)]
                .map(|(name, sha256)| (name.into(), digest(sha256)))
                .into(),
            checks: vec![],
            depth: Some(depth),
            tolerances: Tolerances::default(),
            perplexity: None,
            range: None,
            nearest: None,
            advice: None,
            kl_divergence: None,
            top1_agreement: None,
            blocks: vec![],
        }
    }

    #[test]
    fn a_weaker_pass_of_the_same_bytes_leaves_a_stronger_verdict_as_it_is() {
        use Depth::{Beside, Files, Text};
        let run = |pass, depth| receipt(pass, depth, "a");
        for (before, new, stays) in [
            (run(false, Beside), run(true, Files), true),
            (run(false, Beside), run(true, Text), true),
            (run(true, Beside), run(true, Files), true),
            (run(false, Text), run(true, Files), true),
            (run(false, Beside), run(true, Beside), false),
            (run(false, Text), run(true, Beside), false),
            (run(true, Beside), run(false, Files), false),
            (run(false, Files), run(true, Files), false),
            (receipt(false, Beside, "b"), run(true, Files), false),
        ] {
            let right = if stays { &before } else { &new };
            let (found, old) = new.standing(Some(before.clone()));
            assert_eq!((found.pass, found.depth()), (right.pass, right.depth()));
            assert_eq!(old, stays, "{before:?} {new:?}");
            assert_eq!(found.files, new.files);
        }
        assert_eq!(run(true, Files).standing(None), (run(true, Files), false));
    }

    #[test]
    fn a_card_written_in_between_changes_nothing_and_is_on_record() {
        let before = receipt(false, Depth::Beside, "a");
        let mut new = receipt(true, Depth::Files, "a");
        if let Some(card) = new.files.get_mut("README.md") {
            card.sha256 = "another".into();
        }
        let (found, stays) = new.standing(Some(before));
        assert!(stays && !found.pass);
        assert_eq!(found.files["README.md"].sha256, "another");
    }

    #[test]
    fn a_block_without_a_relative_error_says_why_and_old_receipts_are_read() {
        for ([found, whole], error, nothing) in [
            ([1.0, 4.0], Some(0.25), false),
            ([0.0, 0.0], None, true),
            ([1e-9, 0.0], None, false),
            ([f64::NAN, 4.0], None, false),
            ([f64::INFINITY, f64::INFINITY], None, false),
        ] {
            let block = BlockError::new(3, [found, whole], [found, whole]);
            assert_eq!((block.relative_error, block.nearest_error), (error, error));
            assert_eq!(block.does_nothing(), nothing);
            assert_eq!(block.reason.is_none(), error.is_some());
            let text = serde_json::to_string(&block).unwrap();
            assert!(!text.contains("null"), "{text}");
            assert_eq!(serde_json::from_str::<BlockError>(&text).unwrap(), block);
        }
        let old = serde_json::from_str::<BlockError>(r#"{"layer": 1, "relative_error": null}"#);
        assert_eq!(old.unwrap().relative_error, None);
    }
}
