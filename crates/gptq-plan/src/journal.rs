//! The journal of a run under way, `.gptq-journal.jsonl` in the output directory: what its lines hold, and
//! reading them. `gptq-run` writes them.
//!
//! A line of JSON says what the run is ([`Header`]); a line per finished block follows ([`FinishedBlock`]),
//! written and synced after the block's tensors are on the disk in every branch.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gptq_format::FormatError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};

use crate::limits::{MAX_JOURNAL, seconds};
use crate::{
    Allocation, BlockReport, Clamped, Fingerprint, LinearReport, PlanError, RecipeOverrides, Tuning,
};

/// The journal's name in the output directory.
pub const JOURNAL: &str = ".gptq-journal.jsonl";
/// Version of its format.
const VERSION: u32 = 2;
/// Begins a number that JSON's parser would get wrong in the last bit.
const EXACT: &str = "f64:";

/// The recipe, command-line overrides and working directory that are needed to resume a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Origin {
    /// Path of the recipe, for messages.
    pub path: PathBuf,
    /// The recipe's text.
    pub recipe: String,
    /// Changes by the command line.
    pub overrides: RecipeOverrides,
    /// The directory that its paths start from.
    pub directory: PathBuf,
}

/// A journal's first line, which identifies its run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Header {
    version: u32,
    /// Recipe, overrides and directory that a resumed run starts from.
    pub origin: Origin,
    /// The program and the device.
    pub run: Fingerprint,
    /// The model's files, by size and time.
    pub files: Fingerprint,
    /// Digest of the tensors before the first block.
    pub embedding: String,
    /// Fingerprints of the branches, by name.
    pub branches: BTreeMap<String, Fingerprint>,
    /// Allocations of the branches that have a budget, by name.
    #[serde(default)]
    pub allocations: BTreeMap<String, Allocation>,
}

/// A journal's line of a finished block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinishedBlock {
    /// Block index.
    pub layer: usize,
    /// Digest of the dense tensors that it was made from.
    pub source: String,
    /// Each branch's part, by branch name.
    pub branches: BTreeMap<String, BranchBlock>,
    /// SHA-256 of the hidden states after it, where they were kept.
    pub states: Option<String>,
}

/// One branch's part of a finished block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BranchBlock {
    /// Seconds spent on the branch so far.
    pub seconds: f64,
    /// Reports of the block's linears, with digests.
    pub linears: Vec<LinearReport>,
    /// Hidden states that were clamped in the block.
    pub clamped: Vec<Clamped>,
    /// Error of the block's output, where it was compared with the dense model's.
    #[serde(default)]
    pub output_error: Option<f64>,
    /// Tuning of the block, if it was tuned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuning: Option<Tuning>,
    /// Calibration tokens of each expert, if the block has experts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expert_tokens: Vec<usize>,
}

/// A run, as its journal has it.
#[derive(Debug)]
pub struct RecordedRun {
    /// The first line.
    pub header: Header,
    /// Blocks 0, 1, 2, ... in order.
    pub blocks: Vec<FinishedBlock>,
    /// Bytes of the whole lines.
    pub length: u64,
}

impl Header {
    /// A header of this version.
    pub fn new(
        origin: Origin,
        [run, files]: [Fingerprint; 2],
        embedding: String,
        branches: BTreeMap<String, Fingerprint>,
        allocations: BTreeMap<String, Allocation>,
    ) -> Self {
        Header {
            version: VERSION,
            origin,
            run,
            files,
            embedding,
            branches,
            allocations,
        }
    }
}

impl BranchBlock {
    /// Checks that its numbers are such as a run can come to: they go into a report as they are.
    ///
    /// # Errors
    /// Describes the first field that is out of range.
    pub fn check(&self, layer: usize) -> Result<(), String> {
        for linear in &self.linears {
            linear
                .check()
                .map_err(|why| format!("{}.{why}", linear.name))?;
        }
        for clamped in &self.clamped {
            clamped.check().map_err(|why| format!("clamped: {why}"))?;
        }
        if let Some(report) = self.report(layer) {
            report.check().map_err(|why| format!("blocks: {why}"))?;
        }
        seconds("seconds", self.seconds)
    }

    /// The block's row of a report, where its output was compared.
    pub fn report(&self, layer: usize) -> Option<BlockReport> {
        let output_error = self.output_error?;
        Some(BlockReport {
            layer,
            output_error,
            tuning: self.tuning.clone(),
            expert_tokens: self.expert_tokens.clone(),
        })
    }
}

impl RecordedRun {
    /// The journal in `output`, if there is one.
    ///
    /// # Errors
    /// It cannot be read, or is not one that this version wrote.
    pub fn read(output: &Path) -> Result<Option<RecordedRun>, PlanError> {
        let path = output.join(JOURNAL);
        let damaged = |reason: &str| PlanError::Journal {
            path: path.clone(),
            reason: reason.to_owned(),
        };
        let length = match fs::symlink_metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(FormatError::io(&path)(e).into()),
            Ok(meta) if !meta.is_file() => return Err(damaged("not a regular file")),
            Ok(meta) => meta.len(),
        };
        if length > MAX_JOURNAL {
            return Err(damaged("too long to be a journal"));
        }
        let bytes = fs::read(&path).map_err(FormatError::io(&path))?;
        let mut lines = bytes.split_inclusive(|&byte| byte == b'\n');
        let first = lines.next().unwrap_or_default();
        let header: Header =
            parse(first).ok_or_else(|| damaged("its first line does not say what the run is"))?;
        if header.version != VERSION {
            return Err(damaged("of another version"));
        }
        let mut found = RecordedRun {
            header,
            blocks: Vec::new(),
            length: first.len() as u64,
        };
        for line in lines {
            match parse::<FinishedBlock>(line) {
                Some(block) if block.layer == found.blocks.len() => {
                    found.blocks.push(block);
                    found.length += line.len() as u64;
                }
                // Only the last line can be half there.
                _ if found.length + line.len() as u64 == bytes.len() as u64 => break,
                _ => return Err(damaged("damaged in the middle")),
            }
        }
        Ok(Some(found))
    }
}

/// A record as a line of the journal, its newline included.
pub fn journal_line(record: &impl Serialize) -> Vec<u8> {
    let value = serde_json::to_value(record).expect("a record of plain values always serialises");
    let mut line = exact(value).to_string().into_bytes();
    line.push(b'\n');
    line
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let line = line.strip_suffix(b"\n")?;
    let value = inexact(serde_json::from_slice(line).ok()?);
    serde_json::from_value(value).ok()
}

/// Replaces every fraction by its bits: a report is to have the same digits whether it went through
/// the journal or not.
fn exact(value: Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() => {
            let bits = number.as_f64().unwrap_or_default().to_bits();
            Value::String(format!("{EXACT}{bits:016x}"))
        }
        other => each(other, exact),
    }
}

/// The inverse of [`exact`].
fn inexact(value: Value) -> Value {
    let number = |text: &str| {
        let bits = u64::from_str_radix(text.strip_prefix(EXACT)?, 16).ok()?;
        Number::from_f64(f64::from_bits(bits))
    };
    match &value {
        Value::String(text) if let Some(number) = number(text) => Value::Number(number),
        _ => each(value, inexact),
    }
}

fn each(value: Value, f: fn(Value) -> Value) -> Value {
    match value {
        Value::Array(values) => values.into_iter().map(f).collect(),
        Value::Object(entries) => entries.into_iter().map(|(k, v)| (k, f(v))).collect(),
        leaf => leaf,
    }
}
