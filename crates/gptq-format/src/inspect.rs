//! Describes a checkpoint from its files alone: a directory or a single file, written by any tool.
//!
//! In AutoGPTQ's layout tensors take precedence (`inspect/linears.rs`), and configs add what tensors cannot show.

mod linears;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::Value;

use crate::mapped_file::MappedFile;
use crate::{
    Bits, Checkpoint, Contents, FormatError, GgufFile, GroupSize, ModuleNames, client_support,
    read_json, sha256, side_files,
};

pub use linears::LinearInfo;
use linears::{quantized_linears, stored_format};

/// Description of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Inspection {
    /// "dense", or the name of a format.
    pub format: &'static str,
    /// `model_type` of `config.json`.
    pub model_type: Option<String>,
    /// The base model's name, if a config has it.
    pub base_model: Option<String>,
    /// Files, sorted by name.
    pub files: Vec<FileInfo>,
    /// Bytes of all tensors.
    pub tensor_bytes: usize,
    /// Common settings of the quantized linear layers; `None` for a dense checkpoint.
    pub settings: Option<SharedSettings>,
    /// The quantized linear layers.
    pub linears: Vec<LinearInfo>,
    /// Clients that can load it; empty for a dense checkpoint.
    pub clients: Vec<ClientInfo>,
    /// Every tensor.
    pub tensors: Vec<TensorInfo>,
    /// Notes on unexpected files, one sentence each.
    pub notes: Vec<String>,
}

/// A file of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct FileInfo {
    pub name: String,
    pub bytes: u64,
    pub sha256: String,
}

/// Common settings of the quantized linear layers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SharedSettings {
    /// Source of the settings: a config's file name, or "tensors" if there is no config.
    pub source: &'static str,
    /// Code width, if all linear layers have the same.
    pub bits: Option<Bits>,
    /// Columns per group, if all linear layers have the same.
    pub group_size: Option<GroupSize>,
    /// True if any `g_idx` is out of order.
    pub act_order: bool,
    /// True if all zero points are in the middle of the code range.
    pub sym: bool,
    /// Damping as a fraction, if a config has it.
    pub damp_percent: Option<f64>,
    /// Number of linear layers without `g_idx` in a format that has it, read as groups in order.
    pub without_g_idx: usize,
}

/// A client's verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct ClientInfo {
    pub name: &'static str,
    pub loads: bool,
    /// Rule that fails, if any.
    pub why: Option<&'static str>,
    /// Advice for its user, if it loads.
    pub note: Option<&'static str>,
    /// Versions that the rules are based on.
    pub tried: &'static str,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct TensorInfo {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: usize,
    /// SHA-256 of its little-endian elements, row-major.
    pub sha256: String,
}

impl Inspection {
    /// Describes the checkpoint in the directory `path`, or the single file `path` with the configs
    /// beside it.
    ///
    /// # Errors
    /// Files that cannot be read, or quantized tensors with inconsistent shapes.
    pub fn of(path: &Path) -> Result<Self, FormatError> {
        if path.extension().is_some_and(|end| end == "gguf") {
            return Inspection::of_gguf(path);
        }
        let (dir, checkpoint) = match path.is_dir() {
            true => (path, Checkpoint::open(path)?),
            false => {
                let parent = path.parent().filter(|p| *p != Path::new(""));
                let dir = parent.unwrap_or(Path::new("."));
                (dir, Checkpoint::open_file(path)?)
            }
        };
        let linears = quantized_linears(&checkpoint)?;
        let config: Value = match dir.join("config.json").exists() {
            true => read_json(&dir.join("config.json"))?,
            false => Value::Null,
        };
        let own = checkpoint.quantize_config();
        let settings = (!linears.is_empty()).then(|| SharedSettings {
            source: match (own, dir.join("quantize_config.json").exists()) {
                (None, _) => "tensors",
                (_, true) => "quantize_config.json",
                (_, false) => "config.json",
            },
            bits: shared(&linears, |l| l.bits),
            group_size: shared(&linears, |l| l.group_size),
            act_order: linears.iter().any(|l| l.act_order),
            sym: own.map_or_else(|| linears.iter().all(|l| l.sym), |c| c.sym),
            damp_percent: own.and_then(|c| c.damp_percent),
            without_g_idx: match own.is_none_or(|c| c.checkpoint_format.is_autogptq()) {
                true => linears.iter().filter(|l| !l.g_idx).count(),
                false => 0,
            },
        });
        let stray = stray(&checkpoint, &linears)?;
        let listed = match path.is_dir() {
            true => files(path)?,
            false => vec![file(dir, &name_of(path))?],
        };
        let gguf = listed.iter().any(|file| file.name.ends_with(".gguf"));
        let tensors: Vec<TensorInfo> = tensors(&checkpoint)?;
        let format = stored_format(&checkpoint, &linears)?;
        Ok(Inspection {
            format: (settings.as_ref()).map_or("dense", |_| format.name()),
            model_type: config
                .get("model_type")
                .and_then(|name| Some(name.as_str()?.to_owned())),
            base_model: own.and_then(|c| c.model_name_or_path.clone()),
            files: listed,
            tensor_bytes: tensors.iter().map(|t| t.bytes).sum(),
            clients: settings.as_ref().map_or_else(Vec::new, |settings| {
                let shapes = linears.iter().map(LinearInfo::shape).collect();
                // Tensors take precedence over the config.
                let mixed = settings.bits.is_none() || settings.group_size.is_none();
                let scattered = settings.act_order;
                let names = ModuleNames::of(linears.iter().map(|linear| &linear.name));
                let contents = match own {
                    Some(config) => Contents {
                        gguf,
                        sym: settings.sym,
                        scattered,
                        mixed,
                        stray,
                        names,
                        ..Contents::of(config, shapes)
                    },
                    None => Contents {
                        linears: shapes,
                        sym: settings.sym,
                        format,
                        gguf,
                        desc_act: scattered,
                        static_groups: false,
                        scattered,
                        mixed,
                        skips: false,
                        parted: false,
                        listed: false,
                        stray,
                        names,
                        damp_percent: None,
                    },
                };
                clients(&contents)
            }),
            notes: checkpoint.notes().to_vec(),
            settings,
            linears,
            tensors,
        })
    }
}

impl Inspection {
    fn of_gguf(path: &Path) -> Result<Self, FormatError> {
        let file = GgufFile::open(path)?;
        let mut tensors = Vec::new();
        for tensor in file.tensors() {
            let (_, bytes) = file.tensor(&tensor.name)?;
            tensors.push(TensorInfo {
                name: tensor.name.clone(),
                dtype: tensor.kind.name().to_owned(),
                shape: tensor.shape.clone(),
                bytes: bytes.len(),
                sha256: sha256(bytes),
            });
            file.give_back(&tensor.name);
        }
        let dir = path.parent().unwrap_or(Path::new(""));
        Ok(Inspection {
            format: "gguf",
            model_type: file.text("general.architecture").map(str::to_owned),
            base_model: file.text("general.name").map(str::to_owned),
            files: vec![self::file(dir, &name_of(path))?],
            tensor_bytes: tensors.iter().map(|it| it.bytes).sum(),
            settings: None,
            linears: Vec::new(),
            clients: Vec::new(),
            tensors,
            notes: Vec::new(),
        })
    }
}

/// Returns true if a linear layer is dense although the config says that it is quantized, or the
/// other way round.
fn stray(checkpoint: &Checkpoint, linears: &[LinearInfo]) -> Result<bool, FormatError> {
    let Some(config) = checkpoint.quantize_config() else {
        return Ok(false);
    };
    for linear in linears {
        if config.module(&linear.name)?.is_none() {
            return Ok(true);
        }
    }
    // Lists of blocks with quantized linear layers, and the kinds of these. A part that no text goes
    // through, such as a vision tower, has blocks of its own, which clients leave as they are.
    let of = |module| (blocks(module), kind(module));
    let kinds: BTreeSet<(&str, &str)> = linears.iter().map(|linear| of(&linear.name)).collect();
    let lists: BTreeSet<&str> = kinds.iter().map(|(blocks, _)| *blocks).collect();
    // In some formats codes have the name of dense weights.
    let quantized: BTreeSet<&str> = linears.iter().map(|linear| linear.name.as_str()).collect();
    for module in checkpoint
        .names()
        .filter_map(|name| name.strip_suffix(".weight"))
        .filter(|module| !quantized.contains(module))
    {
        let (blocks, kind) = of(module);
        // Linear layers of a block, except routers, which are never quantized.
        let in_block = kind != module && lists.contains(blocks);
        let linear = kinds.contains(&(blocks, kind)) || (in_block && kind.ends_with("_proj"));
        if linear && config.module(module)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns a linear layer's name without its block.
fn kind(module: &str) -> &str {
    let digit = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let mut rest = module;
    while let Some((first, others)) = rest.split_once('.') {
        rest = others;
        if digit(first) {
            return rest;
        }
    }
    module
}

/// Returns the list of blocks that a module belongs to, its name up to the block's number.
fn blocks(module: &str) -> &str {
    let block = module.strip_suffix(kind(module)).unwrap_or_default();
    block.trim_end_matches(|c: char| c == '.' || c.is_ascii_digit())
}

/// Describes the files of a directory: no directories or hidden files, and from subdirectories only
/// the files that are copied into branches.
///
/// # Errors
/// A directory or file that cannot be read.
pub fn files(dir: &Path) -> Result<Vec<FileInfo>, FormatError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(FormatError::io(dir))? {
        let path = entry.map_err(FormatError::io(dir))?.path();
        let name = name_of(&path);
        if path.is_file() && !name.starts_with('.') {
            names.push(name);
        }
    }
    names.extend(
        side_files(dir)?
            .into_iter()
            .filter(|name| name.contains('/')),
    );
    names.sort();
    names.par_iter().map(|name| file(dir, name)).collect()
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn file(dir: &Path, name: &str) -> Result<FileInfo, FormatError> {
    let bytes = MappedFile::open(&dir.join(name))?;
    Ok(FileInfo {
        name: name.to_owned(),
        bytes: bytes.len() as u64,
        sha256: sha256(&bytes),
    })
}

fn tensors(checkpoint: &Checkpoint) -> Result<Vec<TensorInfo>, FormatError> {
    let names: Vec<&str> = checkpoint.names().collect();
    let describe = |name: &&str| {
        let view = checkpoint.view(name)?;
        let bytes = view.bytes();
        Ok(TensorInfo {
            name: name.to_string(),
            dtype: format!("{:?}", view.dtype),
            shape: view.shape.to_vec(),
            bytes: bytes.len(),
            sha256: sha256(&bytes),
        })
    };
    names.par_iter().map(describe).collect()
}

fn shared<T: PartialEq>(linears: &[LinearInfo], value: impl Fn(&LinearInfo) -> T) -> Option<T> {
    let mut values = linears.iter().map(value);
    let first = values.next()?;
    values.all(|v| v == first).then_some(first)
}

fn clients(contents: &Contents) -> Vec<ClientInfo> {
    let supports = client_support(contents).into_iter();
    supports
        .map(|support| ClientInfo {
            name: support.client.name(),
            loads: support.verdict.is_ok(),
            why: support.verdict.err(),
            note: support.note,
            tried: support.tried,
        })
        .collect()
}
