//! The one error type of this crate.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::Half;

/// What can be wrong with bytes on disk. Every message names the thing and, where there is one,
/// the remedy.
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
    #[error("{}: not a PyTorch file that can be read: {reason}", path.display())]
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
        "{}: tensor {name} is in {one} and in {other}, with other values, and no index says which counts; \
         remove one of the files", dir.display()
    )]
    TwoTensors {
        dir: PathBuf,
        name: String,
        one: String,
        other: String,
    },
    #[error("{}: made by {method}, which gptq does not read; {}", path.display(), instead(*dense, path))]
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
        "tensor {name}: a scale reaches f16's largest, 65504, and scales are stored in f16; leave this \
         linear out with an override that says skip = true"
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
        "a zero point of 0 cannot be stored in checkpoint_format \"gptq\", which stores zero - 1; \
         write \"gptq_v2\""
    )]
    ZeroPointZero,
    #[error(
        "{module}: qweight {qweight:?}, qzeros {qzeros:?} and scales {scales:?} do not fit together"
    )]
    PackedShapes {
        module: String,
        qweight: [usize; 2],
        qzeros: [usize; 2],
        scales: [usize; 2],
    },
    #[error("{name}: g_idx[{row}] = {value}, but there are {groups} groups")]
    GroupIndex {
        name: String,
        row: usize,
        value: i32,
        groups: usize,
    },
    #[error(
        "{}: already holds something that gptq did not write; choose another output directory or \
         move it away", dir.display()
    )]
    Occupied { dir: PathBuf },
    #[error(
        "{}: something that gptq did not write has come to be here; what is finished lies in {}: move \
         the first away, then run the same command again", dir.display(), partial.display()
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
    #[error(
        "tensor {name} was not in the writer's plan, or was written twice, or has a wrong length"
    )]
    UnplannedWrite { name: String },
    #[error(
        "{}: {} in it: the base model's weight files lack it, or its config.json asks for what they do not hold; \
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
        1 => format!("tensor {first} belongs into this branch, and nothing put it"),
        n => format!(
            "tensor {first} and {} more belong into this branch, and nothing put them",
            n - 1
        ),
    }
}

/// What to do about settings of another method.
fn instead(dense: bool, path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    match dense {
        true => format!(
            "the weights themselves are in full precision, so it is a leftover: remove {} and use them as \
             they are",
            match file == "config.json" {
                true => "quantization_config from config.json".to_owned(),
                false => file.into_owned(),
            }
        ),
        false => "use the full-precision model that it was made from".to_owned(),
    }
}

fn over(half: &Half) -> &'static str {
    match half {
        Half::F16 => "f16 (over 65504)",
        Half::Bf16 => "bf16 (over 3.39e38)",
    }
}

/// What to do about a value too large.
fn wider(half: &Half) -> &'static str {
    match half {
        Half::F16 => "; dtype = \"bf16\" in a recipe's [model] holds such values",
        Half::Bf16 => "",
    }
}
