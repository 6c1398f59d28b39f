//! Errors of this crate.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::{Half, Refusal};

/// Reason why files could not be read or written. Every message names the object and, if there is
/// one, the remedy.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum FormatError {
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "{}: no checkpoint here (looked for model.safetensors and pytorch_model.bin, for the .index.json of \
         either, and for a full set of shards; weight files here: {there}); point at the directory that \
         holds them", dir.display()
    )]
    NoCheckpoint { dir: PathBuf, there: String },
    #[error(
        "{}: not a readable safetensors file ({reason}); it may be truncated: fetch or write it again",
        path.display()
    )]
    Header { path: PathBuf, reason: String },
    #[error(
        "{}: a Git LFS pointer instead of the weights; fetch them with git lfs pull", path.display()
    )]
    LfsPointer { path: PathBuf },
    #[error("{}: not a readable PyTorch file: {reason}", path.display())]
    Torch { path: PathBuf, reason: String },
    #[error("{}: {source}", path.display())]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
    #[error("{}: {reason}", path.display())]
    Malformed { path: PathBuf, reason: String },
    #[error(
        "{}: tensor {name} is missing{hint}; the checkpoint is incomplete or of another architecture",
        dir.display()
    )]
    MissingTensor {
        dir: PathBuf,
        name: String,
        hint: String,
    },
    #[error(
        "{}: tensor {name} is in {one} and in {other} with different values, and no index says which to use; \
         remove one of the files", dir.display()
    )]
    TwoTensors {
        dir: PathBuf,
        name: String,
        one: String,
        other: String,
    },
    #[error("{}: quantized by {method}, which gptq does not read; {}", path.display(), instead(*dense, path))]
    OtherMethod {
        path: PathBuf,
        method: String,
        dense: bool,
    },
    #[error("tensor {name} has shape {found:?}, expected {expected:?}")]
    Shape {
        name: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("tensor {name} has dtype {found}, expected {expected}")]
    Dtype {
        name: String,
        found: String,
        expected: &'static str,
    },
    #[error(
        "tensor {name} holds {count} non-finite value(s), the first at element {first}; \
         the checkpoint is damaged and cannot be quantized"
    )]
    NonFinite {
        name: String,
        first: usize,
        count: usize,
    },
    #[error(
        "tensor {name} holds {count} value(s) too large for {}, the first at element {first}{}",
        over(half),
        wider(half)
    )]
    Overflow {
        name: String,
        half: Half,
        first: usize,
        count: usize,
    },
    #[error(
        "tensor {name}: a scale reaches 65504, the largest f16 value, and scales are stored in f16; exclude this \
         linear layer with an override that has skip = true"
    )]
    Scale { name: String },
    #[error(
        "{in_features} x {out_features}: packing needs both in_features and out_features to be multiples of 32"
    )]
    Unpackable {
        in_features: usize,
        out_features: usize,
    },
    #[error(
        "tensor {name}: a zero point of 0 cannot be stored in checkpoint_format \"gptq\", which stores zero - 1; \
         write \"gptq_v2\""
    )]
    ZeroPointZero { name: String },
    #[error(
        "{module}: qweight {qweight:?}, qzeros {qzeros:?} and scales {scales:?} are inconsistent"
    )]
    PackedShapes {
        module: String,
        qweight: [usize; 2],
        qzeros: [usize; 2],
        scales: [usize; 2],
    },
    #[error(
        "{module} is quantized, but config.json does not say how; restore the config.json that belongs to it"
    )]
    Undeclared { module: String },
    #[error(
        "{module}: a code is too far from its zero point for {kind}, although its settings allow it; check the branch with \
         gptq verify"
    )]
    BlockCode { module: String, kind: &'static str },
    #[error("{module}: {refusal}")]
    DoesNotFit { module: String, refusal: Refusal },
    #[error(
        "tensor {name} says {found:?}, but the model's linear layer is {expected:?}; the file is damaged"
    )]
    DeclaredShape {
        name: String,
        found: Vec<i64>,
        expected: [usize; 2],
    },
    #[error("{name}: g_idx[{row}] = {value}, but there are {groups} groups")]
    GroupIndex {
        name: String,
        row: usize,
        value: i32,
        groups: usize,
    },
    #[error(
        "{}: already contains files that gptq did not write; choose another output directory or \
         move it away", dir.display()
    )]
    Occupied { dir: PathBuf },
    #[error(
        "{}: target directory was created by another program during the run; the finished branch is in {}: move \
         the target away, then run the same command again", dir.display(), partial.display()
    )]
    Taken { dir: PathBuf, partial: PathBuf },
    #[error(
        "{}: {holder} is writing here; wait for it, or choose another output directory", dir.display()
    )]
    Locked { dir: PathBuf, holder: String },
    #[error("{}: not a regular file; gptq does not write through links: remove it", path.display())]
    NotAFile { path: PathBuf },
    #[error("{}: no space left on the disk; make room, then run the same command again", path.display())]
    DiskFull { path: PathBuf },
    #[error("tensor {name} was not planned, was written twice, or has the wrong length")]
    UnplannedWrite { name: String },
    #[error(
        "{}: {}: the base model's weight files lack it, or its config.json does not match them; \
         compare the two with gptq inspect",
        dir.display(),
        lacking(*missing, first)
    )]
    Unwritten {
        dir: PathBuf,
        missing: usize,
        first: String,
    },
}

impl FormatError {
    /// Wraps an I/O error with the path it happened on.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> FormatError {
        let path = path.into();
        move |source| match source.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                FormatError::DiskFull { path }
            }
            _ => FormatError::Io { path, source },
        }
    }
}

fn lacking(missing: usize, first: &str) -> String {
    match missing {
        1 => format!("tensor {first} of this branch was never written"),
        n => format!(
            "tensor {first} and {} more of this branch were never written",
            n - 1
        ),
    }
}

/// Suggests a remedy for settings of another method.
fn instead(dense: bool, path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    match dense {
        true => format!(
            "the weights themselves are in full precision, so the settings are a leftover: remove {} and use the weights as \
             they are",
            match file == "config.json" {
                true => "quantization_config from config.json".to_owned(),
                false => file.into_owned(),
            }
        ),
        false => "use the full-precision model it was quantized from".to_owned(),
    }
}

fn over(half: &Half) -> &'static str {
    match half {
        Half::F16 => "f16 (over 65504)",
        Half::Bf16 => "bf16 (over 3.39e38)",
    }
}

/// Suggests a remedy for a value that is too large.
fn wider(half: &Half) -> &'static str {
    match half {
        Half::F16 => "; dtype = \"bf16\" in a recipe's [model] can store such values",
        Half::Bf16 => "",
    }
}
