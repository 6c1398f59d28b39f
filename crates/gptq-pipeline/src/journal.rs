//! The journal of a run under way: `.gptq-journal.jsonl` in the output directory.
//!
//! A line of JSON says what the run is ([`Header`]); a line per finished block follows ([`Block`]),
//! written and synced after the block's tensors are on the disk in every branch. The packed tensors of
//! the finished blocks give the hidden states again; now and then these are kept too, and the block's
//! line has their digest ([`crate::kept_states`]). The file goes when the last branch is in place.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use gptq_format::{FormatError, write_file};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};

use crate::fingerprint::{Fingerprint, Fingerprints};
use crate::kept_states::prune;
use crate::report_limits::MAX_JOURNAL;
use crate::{Allocation, Clamped, LinearReport, PipelineError, RecipeOverrides};

const FILE: &str = ".gptq-journal.jsonl";
/// Of this format.
const VERSION: u32 = 2;
/// Begins a number that JSON's parser would get wrong in the last bit.
const EXACT: &str = "f64:";

/// What was asked for, to be asked for again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// Where the recipe was, for messages.
    pub(crate) path: PathBuf,
    /// The recipe's text.
    pub(crate) recipe: String,
    /// What the command line changed in it.
    pub(crate) overrides: RecipeOverrides,
    /// The directory that its paths start from.
    pub(crate) directory: PathBuf,
}

/// What a run is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Header {
    version: u32,
    pub(crate) origin: Origin,
    pub(crate) run: Fingerprint,
    /// The model's files, by size and time.
    pub(crate) files: Fingerprint,
    /// Digest of what comes before the first block ([`crate::sources`]).
    pub(crate) embedding: String,
    /// By name.
    pub(crate) branches: BTreeMap<String, Fingerprint>,
    /// How the budgets of those that have one are spent, by name.
    #[serde(default)]
    pub(crate) allocations: BTreeMap<String, Allocation>,
}

/// A finished block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Block {
    pub(crate) layer: usize,
    /// Digest of the tensors that it was made from ([`crate::sources`]).
    pub(crate) source: String,
    /// By name.
    pub(crate) branches: BTreeMap<String, BranchBlock>,
    /// SHA-256 of the hidden states after it, where they were kept.
    pub(crate) states: Option<String>,
}

/// What a finished block gave one branch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct BranchBlock {
    /// Spent on the branch so far.
    pub(crate) seconds: f64,
    /// With digests.
    pub(crate) linears: Vec<LinearReport>,
    pub(crate) clamped: Vec<Clamped>,
    /// Of the block's output, where it was compared with the dense model's.
    #[serde(default)]
    pub(crate) output_error: Option<f64>,
}

/// A journal as it was found.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub(crate) header: Header,
    /// Of blocks 0, 1, 2, ...
    pub(crate) blocks: Vec<Block>,
    /// Bytes of the lines that are whole.
    length: u64,
}

/// A journal being written.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
}

impl Header {
    pub(crate) fn new(
        origin: Origin,
        prints: &Fingerprints,
        branches: BTreeMap<String, Fingerprint>,
        allocations: BTreeMap<String, Allocation>,
    ) -> Self {
        Header {
            version: VERSION,
            origin,
            run: prints.run.clone(),
            files: prints.files.clone(),
            embedding: prints.embedding.clone(),
            branches,
            allocations,
        }
    }
}

impl Journal {
    /// Begins one in `output`.
    pub(crate) fn create(output: &Path, header: &Header) -> Result<Self, FormatError> {
        let path = output.join(FILE);
        write_file(&path, &line(header))?;
        // Its name is to be on the disk as well.
        File::open(output)
            .and_then(|dir| dir.sync_all())
            .map_err(FormatError::io(output))?;
        Journal::open(path)
    }

    /// Goes on with one.
    pub(crate) fn reopen(output: &Path, recorded: &Recorded) -> Result<Self, FormatError> {
        let journal = Journal::open(output.join(FILE))?;
        // What a process that died wrote last may be half a line.
        (journal.file)
            .set_len(recorded.length)
            .map_err(FormatError::io(&journal.path))?;
        Ok(journal)
    }

    fn open(path: PathBuf) -> Result<Self, FormatError> {
        match OpenOptions::new().write(true).open(&path) {
            Ok(file) => Ok(Journal { path, file }),
            Err(e) => Err(FormatError::io(path)(e)),
        }
    }

    /// Adds a block, and waits until it is on the disk. Of hidden states, only the last kept stay.
    pub(crate) fn append(&mut self, block: &Block) -> Result<(), FormatError> {
        let line = line(block);
        let file = &mut self.file;
        let end = file
            .seek(SeekFrom::End(0))
            .map_err(FormatError::io(&self.path))?;
        if end + line.len() as u64 > MAX_JOURNAL {
            return Err(FormatError::Malformed {
                path: self.path.clone(),
                reason: format!("would be over {MAX_JOURNAL} bytes, and not be read again"),
            });
        }
        file.write_all(&line)
            .and_then(|()| file.sync_data())
            .map_err(FormatError::io(&self.path))?;
        match (&block.states, self.path.parent()) {
            (Some(_), Some(output)) => prune(output, Some(block.layer)),
            _ => Ok(()),
        }
    }

    /// The journal in `output`, if there is one.
    ///
    /// # Errors
    /// It cannot be read, or is not one that this version wrote.
    pub(crate) fn read(output: &Path) -> Result<Option<Recorded>, PipelineError> {
        let path = output.join(FILE);
        let damaged = |reason: &str| PipelineError::Journal {
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
        let mut found = Recorded {
            header,
            blocks: Vec::new(),
            length: first.len() as u64,
        };
        for line in lines {
            match parse::<Block>(line) {
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

    /// Removes the journal of `output`, and the hidden states that were kept with it.
    pub(crate) fn remove(output: &Path) -> Result<(), FormatError> {
        prune(output, None)?;
        let path = output.join(FILE);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(FormatError::io(&path)(e)),
            _ => Ok(()),
        }
    }
}

fn line(record: &impl Serialize) -> Vec<u8> {
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

#[cfg(test)]
mod tests {
    use gptq_solver::Gains;

    use super::*;

    fn header() -> Header {
        let origin = Origin {
            path: "r.toml".into(),
            recipe: "# mine".into(),
            overrides: RecipeOverrides::default(),
            directory: "/".into(),
        };
        let prints = Fingerprints::default();
        Header::new(origin, &prints, BTreeMap::new(), BTreeMap::new())
    }

    fn block(layer: usize) -> Block {
        let linear = LinearReport {
            layer,
            name: "x".into(),
            shape: [1, 2],
            bits: gptq_format::Bits::Four,
            group_size: gptq_format::GroupSize::Row,
            // Numbers that JSON's parser gets wrong in the last bit are among these.
            relative_error: (layer as f64 + 0.1).ln() * 1e-7,
            rtn_error: std::f64::consts::PI * 1e-300,
            ratio: 1.0 / 3.0,
            gains: Gains {
                scale_search: Some(2.0_f64.sqrt() * 1e-5),
                ..Gains::default()
            },
            output_error: Some(1.0 / 7.0),
            rtn_output_error: Some(2.0 / 7.0),
            solver_objective: None,
            damp_percent: 0.1,
            dead_columns: 0,
            seconds: 1.5e-9,
            digests: None,
        };
        let one = BranchBlock {
            seconds: 2.0,
            linears: vec![linear],
            clamped: Vec::new(),
            output_error: Some(1e-3 / 3.0),
        };
        Block {
            layer,
            source: "0".to_owned(),
            branches: BTreeMap::from([("main".to_owned(), one)]),
            states: None,
        }
    }

    #[test]
    fn no_linear_takes_more_than_plans_are_judged_by() {
        let mut longest = block(4095).branches["main"].linears[0].clone();
        longest.name = "model.layers.4095.self_attn.q_proj".into();
        longest.shape = [1 << 24, 1 << 24];
        longest.group_size = gptq_format::GroupSize::Columns(1 << 24);
        longest.dead_columns = 1 << 24;
        longest.gains = Gains {
            scale_search: Some(-1.234_567_890_123_456_7e-300),
            asymmetric: Some(-1.234_567_890_123_456_7e-300),
            refine: Some(-1.234_567_890_123_456_7e-300),
        };
        let digest = "0".repeat(64);
        let digests = serde_json::json!({
            "qweight": digest, "qzeros": digest, "scales": digest, "g_idx": digest,
        });
        longest.digests = Some(serde_json::from_value(digests).unwrap());
        let journal = line(&longest).len();
        let report = serde_json::to_string_pretty(&[[&longest]]).unwrap().len();
        for bytes in [journal, report] {
            assert!(bytes as u64 <= crate::report_limits::LINEAR, "{bytes}");
        }
    }

    #[test]
    fn what_is_written_is_read_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Journal::read(dir.path()).unwrap().is_none());
        let mut journal = Journal::create(dir.path(), &header()).unwrap();
        let blocks: Vec<Block> = (0..50).map(block).collect();
        for block in &blocks {
            journal.append(block).unwrap();
        }
        let read = Journal::read(dir.path()).unwrap().unwrap();
        assert_eq!(read.blocks, blocks);
        assert_eq!(read.header.origin.recipe, "# mine");
        Journal::remove(dir.path()).unwrap();
        assert!(Journal::read(dir.path()).unwrap().is_none());
    }

    #[test]
    fn a_record_of_before_outputs_were_compared_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut journal = Journal::create(dir.path(), &header()).unwrap();
        journal.append(&block(0)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let (first, record) = text.split_once('\n').unwrap();
        let mut record: Value = serde_json::from_str(record).unwrap();
        let branch = record["branches"]["main"].as_object_mut().unwrap();
        branch.remove("output_error").unwrap();
        let linear = branch["linears"][0].as_object_mut().unwrap();
        for key in ["output_error", "rtn_output_error"] {
            linear.remove(key).unwrap();
        }
        fs::write(&path, format!("{first}\n{record}\n")).unwrap();
        let read = Journal::read(dir.path()).unwrap().unwrap();
        let branch = &read.blocks[0].branches["main"];
        assert_eq!(branch.output_error, None);
        assert_eq!(branch.linears[0].output_error, None);
        let before = &block(0).branches["main"].linears[0];
        assert_eq!(branch.linears[0].relative_error, before.relative_error);
    }

    #[test]
    fn a_journal_cut_anywhere_loses_only_the_block_it_was_cut_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut journal = Journal::create(dir.path(), &header()).unwrap();
        let begin = fs::metadata(&path).unwrap().len() as usize;
        for layer in 0..3 {
            journal.append(&block(layer)).unwrap();
        }
        let whole = fs::read(&path).unwrap();
        for cut in begin..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let read = Journal::read(dir.path()).unwrap().unwrap();
            let lines = whole[begin..cut].iter().filter(|&&b| b == b'\n').count();
            assert_eq!(read.blocks.len(), lines);
            let mut journal = Journal::reopen(dir.path(), &read).unwrap();
            journal.append(&block(lines)).unwrap();
            let read = Journal::read(dir.path()).unwrap().unwrap();
            assert_eq!(read.blocks.len(), lines + 1);
        }
    }

    #[test]
    fn damage_before_the_last_line_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let mut journal = Journal::create(dir.path(), &header()).unwrap();
        journal.append(&block(0)).unwrap();
        journal.append(&block(1)).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        for bad in [
            text.replace("\"layer\":0", "\"layer\":7"),
            text.replacen("\"version\":2", "\"version\":9", 1),
            text[1..].to_owned(),
            String::new(),
        ] {
            fs::write(&path, bad).unwrap();
            let error = Journal::read(dir.path()).unwrap_err().to_string();
            assert!(error.contains("--restart"), "{error}");
        }
    }
}
