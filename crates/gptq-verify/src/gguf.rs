//! Checks a GGUF file: its header, and every weight against the branch that it was made from.

use std::path::Path;

use gptq_format::{
    Checkpoint, FormatError, GgufFile, GgufType, Half, decode_blocks, le_bytes, q8_0,
};
use gptq_plan::Check;
use gptq_spec::{Census, GgufModel, ModelConfig, ModelTensor, Role};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::VerifyError;

/// Reopens the GGUF file `file`, and compares it with `branch` if there is one.
///
/// # Errors
/// A file that is not readable, a `branch` that is not a sound checkpoint.
pub fn check_gguf(file: &Path, branch: Option<&Path>) -> Result<Vec<Check>, VerifyError> {
    let gguf = GgufFile::open(file)?;
    let tensors: Vec<_> = gguf.tensors().collect();
    let architecture = gguf.text("general.architecture").unwrap_or("none");
    let count = |kind| tensors.iter().filter(|it| it.kind == kind).count();
    let kinds = [
        GgufType::Q4_0,
        GgufType::Q5_0,
        GgufType::Q8_0,
        GgufType::F16,
        GgufType::Bf16,
        GgufType::F32,
    ];
    let kinds = kinds.into_iter().filter(|kind| count(*kind) > 0);
    let kinds: Vec<String> = kinds
        .map(|kind| format!("{} {}", count(kind), kind.name()))
        .collect();
    let mut checks = vec![Check {
        name: "file".into(),
        pass: true,
        detail: format!("architecture {architecture}, tensors: {}", kinds.join(", ")),
    }];
    if let Some(branch) = branch {
        let (config, checkpoint) = Census::take(branch)?.sound()?;
        let differs = difference(&gguf, &config, &checkpoint);
        checks.push(Check {
            name: "same weights".into(),
            pass: differs.is_none(),
            detail: differs.unwrap_or_else(|| {
                format!(
                    "quantized linear layers are to the bit those of {}",
                    branch.display()
                )
            }),
        });
    }
    Ok(checks)
}

/// Compares the GGUF files in the branch's own directory `dir` with it, and describes what differs, or else the files;
/// `None` if there is no such file.
pub(crate) fn beside(
    dir: &Path,
    config: &ModelConfig,
    checkpoint: &Checkpoint,
) -> Result<Option<(bool, String)>, FormatError> {
    let entries = std::fs::read_dir(dir).map_err(FormatError::io(dir))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".gguf")).collect();
    names.sort();
    for name in &names {
        let differs = match GgufFile::open(&dir.join(name)) {
            Ok(gguf) => difference(&gguf, config, checkpoint),
            Err(error) => return Ok(Some((false, error.to_string()))),
        };
        if let Some(differs) = differs {
            return Ok(Some((false, format!("{name}: {differs}"))));
        }
    }
    let same = format!(
        "quantized linear layers are to the bit those of {}",
        names.join(", ")
    );
    Ok((!names.is_empty()).then_some((true, same)))
}

/// Describes the first difference of a file from the branch that it was made from.
fn difference(gguf: &GgufFile, config: &ModelConfig, checkpoint: &Checkpoint) -> Option<String> {
    let architecture = gguf.text("general.architecture").unwrap_or("none");
    match GgufModel::of(config) {
        Err(reason) => Some(reason),
        Ok(model) if model.architecture() != architecture => Some(format!(
            "the architecture is {architecture}, that of the branch is {}",
            model.architecture()
        )),
        Ok(model) => Compared {
            gguf,
            model,
            checkpoint,
        }
        .difference(&config.tensors()),
    }
}

/// A file and the branch that it was made from.
struct Compared<'a> {
    gguf: &'a GgufFile,
    model: GgufModel<'a>,
    checkpoint: &'a Checkpoint,
}

impl Compared<'_> {
    /// Describes the first tensor that differs.
    fn difference(&self, tensors: &[ModelTensor]) -> Option<String> {
        let run = tensors
            .par_iter()
            .filter(|it| !matches!(it.role, Role::Carried(_)));
        run.find_map_first(|tensor| {
            let name = match self.model.name(tensor) {
                Ok(name) => name,
                Err(reason) => return Some(reason),
            };
            match self.is_same(tensor, &name) {
                Ok(true) => None,
                Ok(false) => Some(format!("{name} differs from {}", tensor.name)),
                Err(error) => Some(error.to_string()),
            }
        })
    }

    fn is_same(&self, tensor: &ModelTensor, name: &str) -> Result<bool, FormatError> {
        let checkpoint = self.checkpoint;
        let (found, mut bytes) = self.gguf.tensor(name)?;
        let mut shape = found.shape.as_slice();
        // A part of the tensor of all experts.
        if let Some((number, experts)) = self.model.expert(tensor) {
            let part = bytes.len() / experts;
            match shape.split_first() {
                Some((n, rest)) if *n == experts && bytes.len() == part * experts => shape = rest,
                _ => return Ok(false),
            }
            bytes = bytes.get(number * part..).unwrap_or_default();
            bytes = bytes.get(..part).unwrap_or_default();
        }
        if shape != tensor.shape {
            return Ok(false);
        }
        let rows = self.model.rows(tensor);
        if let (Role::Linear, &[n_out, n_in]) = (tensor.role, tensor.shape.as_slice())
            && let Some(packed) = checkpoint.packed(tensor.module(), n_in, n_out)?
        {
            let decoded = decode_blocks(bytes, found.kind, rows, [n_out, n_in], name)?;
            let bits =
                |weights: Vec<f32>| weights.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            return Ok(bits(decoded.dequantize()) == bits(packed.unpack().dequantize()));
        }
        let half = checkpoint.half();
        let mut values = vec![0; tensor.shape.iter().product()];
        checkpoint.halves_into(half, &tensor.name, &tensor.shape, &mut values)?;
        let sources = rows.sources(tensor.shape.first().copied().unwrap_or_default());
        let width = values.len() / sources.len().max(1);
        let ordered = sources
            .iter()
            .flat_map(|row| values.iter().skip(row * width).take(width));
        let ordered: Vec<u16> = ordered.copied().collect();
        let shift = self.model.shift(tensor);
        let widened = ordered.iter().map(|bits| match half {
            Half::F16 => f16::from_bits(*bits).to_f32(),
            Half::Bf16 => bf16::from_bits(*bits).to_f32(),
        });
        let expected = match found.kind {
            GgufType::F32 => widened
                .flat_map(|value| (value + shift).to_le_bytes())
                .collect(),
            GgufType::Q8_0 => {
                let mut rounded = Vec::new();
                q8_0(&widened.collect::<Vec<_>>(), &mut rounded);
                rounded
            }
            _ => le_bytes(&ordered).to_vec(),
        };
        self.gguf.give_back(name);
        Ok(bytes == expected)
    }
}
