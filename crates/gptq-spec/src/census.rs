//! The census of a checkpoint: the tensors that are there, compared with those that its config asks for,
//! from headers alone. Bytes are read only of what decides: two tensors that may be one, biases that
//! may be zero.
//!
//! As Transformers 5 has it, what is there decides whether the head is the embedding: a head that differs is
//! the model's own whatever `tie_word_embeddings` says, and of a tied pair either may be missing.
//! Transformers drops tensors that it does not know; here those that would change what the model computes
//! are refused, because whoever published them meant them to.

use std::collections::BTreeSet;
use std::path::Path;

use gptq_format::{Checkpoint, FormatError, LinearShape, QuantizeConfig};
use safetensors::Dtype;

use crate::inventory::{EMBEDDING, HEAD};
use crate::{ModelConfig, ModelTensor, Role, SpecError};

/// Names that a message gives; the others are counted.
const NAMED: usize = 3;

/// What follows from the config, and old checkpoints store all the same: rotary tables, attention masks.
const DERIVED: [&str; 7] = [
    ".inv_freq",
    ".original_inv_freq",
    ".cos_cached",
    ".sin_cached",
    ".masked_bias",
    ".position_ids",
    ".attn.bias",
];

/// Scales of a cache that a client may keep in 8 bits: nothing is computed with them here.
const CACHE_SCALES: [&str; 4] = [".k_scale", ".v_scale", ".q_scale", ".kv_scale"];

/// A checkpoint with its config, compared.
pub struct Census {
    /// With `tied_embeddings` as the tensors have it.
    pub config: ModelConfig,
    /// In which the embedding is there under its own name.
    pub checkpoint: Checkpoint,
    /// What a user should know, in a sentence each.
    pub warnings: Vec<String>,
    /// What makes it unfit to be run; the first that was found.
    pub fault: Option<SpecError>,
}

/// A census under way.
struct Counting<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    /// Every tensor that the model has, quantized or not.
    known: BTreeSet<String>,
}

impl Census {
    /// Of the checkpoint in `dir`.
    ///
    /// # Errors
    /// A config or weights that cannot be read at all.
    pub fn take(dir: &Path) -> Result<Census, SpecError> {
        let config = ModelConfig::read(&dir.join("config.json"))?;
        let checkpoint = Checkpoint::open(dir)?;
        Ok(Census::of(config, checkpoint))
    }

    /// Of an open checkpoint.
    pub fn of(config: ModelConfig, checkpoint: Checkpoint) -> Census {
        let mut census = Census {
            config,
            warnings: checkpoint.notes().to_vec(),
            checkpoint,
            fault: None,
        };
        let counted = census.settle_head().and_then(|()| census.count());
        census.fault = counted.err();
        census
    }

    /// The checkpoint and its config, where the census found nothing against it.
    ///
    /// # Errors
    /// Its fault.
    pub fn sound(self) -> Result<(ModelConfig, Checkpoint), SpecError> {
        match self.fault {
            None => Ok((self.config, self.checkpoint)),
            Some(fault) => Err(fault),
        }
    }

    /// Settles from the tensors whether the head is the embedding.
    fn settle_head(&mut self) -> Result<(), SpecError> {
        let has = |name: &str| self.checkpoint.contains(name);
        match (self.config.tied_embeddings, has(EMBEDDING), has(HEAD)) {
            (true, false, true) => {
                self.checkpoint.serve(EMBEDDING, HEAD);
                Ok(())
            }
            (true, true, true) => {
                let embedding = self.checkpoint.view(EMBEDDING)?;
                let head = self.checkpoint.view(HEAD)?;
                let differs = embedding.shape != head.shape || !embedding.same_values(&head);
                self.checkpoint.give_back(EMBEDDING);
                self.checkpoint.give_back(HEAD);
                if differs {
                    self.config.tied_embeddings = false;
                    self.warnings.push(format!(
                        "{HEAD} is another matrix than {EMBEDDING}, although config.json says \
                         tie_word_embeddings: it is used as the model's head, as Transformers has it, and \
                         branches keep it and say false"
                    ));
                }
                Ok(())
            }
            (false, true, false) if !has("lm_head.qweight") => Err(self.missing(
                HEAD,
                ", and config.json does not say \"tie_word_embeddings\": true, by which the embedding would \
                 be the head",
            )),
            (false, false, true) => Err(self.missing(
                EMBEDDING,
                "; if lm_head.weight is both, say \"tie_word_embeddings\": true in config.json",
            )),
            _ => Ok(()),
        }
    }

    fn missing(&self, name: &str, hint: &str) -> SpecError {
        let missing = self.checkpoint.view(name).map(|_| ()).err();
        match missing {
            Some(FormatError::MissingTensor {
                dir,
                name,
                hint: index,
            }) => {
                let hint = format!("{index}{hint}");
                FormatError::MissingTensor { dir, name, hint }.into()
            }
            Some(other) => other.into(),
            None => unreachable!("asked only for what is not there"),
        }
    }

    fn count(&mut self) -> Result<(), SpecError> {
        let counting = Counting {
            checkpoint: &self.checkpoint,
            config: &self.config,
            known: BTreeSet::new(),
        };
        let warning = counting.count()?;
        self.warnings.extend(warning);
        Ok(())
    }
}

impl Counting<'_> {
    /// Looks at every tensor; what is to be said of those that are left out.
    fn count(mut self) -> Result<Option<String>, SpecError> {
        self.method()?;
        self.adapter()?;
        self.needed()?;
        self.unknown()
    }

    fn refuse(&self, reason: String) -> SpecError {
        SpecError::Census {
            dir: self.checkpoint.dir().into(),
            reason,
        }
    }

    /// Settings and tensors have to agree on whether anything is quantized, and by whom.
    fn method(&self) -> Result<(), SpecError> {
        let quantized = self.checkpoint.quantized_by();
        let mut names = self.checkpoint.names();
        let packed = names.find(|name| name.ends_with(".qweight"));
        match (self.checkpoint.quantize_config(), quantized) {
            (None, Some((method, name))) => Err(self.refuse(match packed {
                Some(name) => format!(
                    "its weights are quantized already ({name}), and neither quantize_config.json nor \
                     config.json's quantization_config says how; put back the file that belongs to them, or \
                     use the full-precision model"
                ),
                None => format!(
                    "its weights are quantized already, by {method} ({name}); use the full-precision model \
                     that it was made from"
                ),
            })),
            (Some(config), _) if packed.is_none() && self.quantizes_any(config)? => {
                let file = match self.checkpoint.dir().join("quantize_config.json").exists() {
                    true => "quantize_config.json says that its linears are quantized by gptq",
                    false => "config.json's quantization_config says that its linears are quantized by gptq",
                };
                Err(self.refuse(format!(
                    "{file}, and no tensor is (no qweight): if the weights are the full-precision model's, \
                     remove those settings; else fetch the quantized weights"
                )))
            }
            _ => Ok(()),
        }
    }

    fn quantizes_any(&self, config: &QuantizeConfig) -> Result<bool, SpecError> {
        for tensor in self.config.block_tensors(0) {
            if tensor.role == Role::Linear && config.module(tensor.module())?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn adapter(&self) -> Result<(), SpecError> {
        let is_adapter = |name: &&str| {
            [
                "lora_",
                "ia3_",
                ".modules_to_save.",
                "prompt_embeddings",
                "hada_w",
            ]
            .iter()
            .any(|part| name.contains(part))
        };
        let found: Vec<&str> = self.checkpoint.names().filter(is_adapter).collect();
        match found.is_empty() {
            true => Ok(()),
            false => Err(self.refuse(format!(
                "{} of an adapter, without which it is another model; merge it into the weights first (PEFT's \
                 merge_and_unload)",
                are(&found)
            ))),
        }
    }

    /// Every tensor that the config asks for: there, with its shape, of a type that can be read.
    fn needed(&mut self) -> Result<(), SpecError> {
        let mut missing = Vec::new();
        for tensor in self.config.tensors() {
            missing.extend(self.one(&tensor)?);
        }
        let more = missing.len().saturating_sub(1);
        match missing.into_iter().next() {
            None => Ok(()),
            Some(FormatError::MissingTensor { dir, name, hint }) => {
                let hint = match more {
                    0 => hint,
                    _ => format!("{hint} and {more} more are"),
                };
                Err(FormatError::MissingTensor { dir, name, hint }.into())
            }
            Some(other) => Err(other.into()),
        }
    }

    /// One tensor of the model, or the four that stand for it where it is quantized; those that are missing.
    fn one(&mut self, tensor: &ModelTensor) -> Result<Vec<FormatError>, SpecError> {
        let settings = match (tensor.role, self.checkpoint.quantize_config()) {
            (Role::Linear, Some(config)) => config.module(tensor.module())?,
            _ => None,
        };
        let mut missing = Vec::new();
        let mut look = |name: &str, shape: &[usize], int: bool, optional: bool| {
            self.known.insert(name.to_owned());
            let view = match self.checkpoint.view(name) {
                Ok(view) => view,
                Err(_) if optional => return Ok(()),
                Err(error) => {
                    missing.push(error);
                    return Ok(());
                }
            };
            if view.shape != shape {
                return Err(SpecError::Format(FormatError::Shape {
                    name: name.into(),
                    found: view.shape.into(),
                    expected: shape.into(),
                }));
            }
            let (fits, expected) = match int {
                true => (view.dtype == Dtype::I32, "I32"),
                false => (
                    matches!(view.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32),
                    "F16, BF16 or F32",
                ),
            };
            match fits {
                true => Ok(()),
                false => Err(SpecError::Format(FormatError::Dtype {
                    name: name.into(),
                    found: format!("{:?}", view.dtype),
                    expected,
                })),
            }
        };
        match (settings, tensor.shape.as_slice()) {
            (Some((bits, group_size)), &[out_features, in_features]) => {
                let linear = LinearShape {
                    in_features,
                    out_features,
                    bits,
                    group_size,
                };
                let desc_act = self
                    .checkpoint
                    .quantize_config()
                    .is_some_and(|c| c.desc_act);
                for spec in linear.tensors(tensor.module()) {
                    let optional = spec.name.ends_with(".g_idx") && !desc_act;
                    let int = spec.dtype == Dtype::I32;
                    look(&spec.name, &spec.shape, int, optional)?;
                }
            }
            _ => look(&tensor.name, &tensor.shape, false, false)?,
        }
        // Where the settings do not say that it was left out.
        let dense = settings.is_some() && self.checkpoint.contains(&tensor.name);
        if let (true, Some(FormatError::MissingTensor { hint, .. })) = (dense, missing.first_mut())
        {
            *hint += &format!(
                " ({} is there, and the settings do not leave it in full precision)",
                tensor.name
            );
        }
        Ok(missing)
    }

    /// Every other tensor: refused where the model would be another with it, else left out.
    fn unknown(&self) -> Result<Option<String>, SpecError> {
        let modules: BTreeSet<String> = (self.known.iter())
            .filter_map(|name| Some(name.rsplit_once('.')?.0.to_owned()))
            .chain(["lm_head".to_owned()])
            .collect();
        let (mut biases, mut further, mut inside, mut outside) = (vec![], vec![], vec![], vec![]);
        for name in self.checkpoint.names() {
            let derived = DERIVED.iter().any(|end| name.ends_with(end));
            // A tied head is the embedding: otherwise it would be needed.
            if self.known.contains(name) || derived || name == HEAD {
                continue;
            }
            let bias = name.strip_suffix(".bias");
            if bias.is_some_and(|module| modules.contains(module)) {
                // Some tools write zeros for linears that have none.
                if !self.checkpoint.view(name)?.is_zero() {
                    biases.push(name);
                }
                self.checkpoint.give_back(name);
            } else if CACHE_SCALES.iter().any(|end| name.ends_with(end)) {
                outside.push(name);
            } else if block(name).is_some_and(|layer| layer >= self.config.layers) {
                further.push(name);
            } else if ["model.layers.", "model.norm.", "model.embed_", "lm_head."]
                .iter()
                .any(|part| name.starts_with(part))
            {
                inside.push(name);
            } else {
                outside.push(name);
            }
        }
        if !biases.is_empty() {
            return Err(self.refuse(format!(
                "{} not zero, and config.json gives these linears no bias; say \"attention_bias\" or \
                 \"mlp_bias\": true there if the model has them, else remove them",
                are(&biases)
            )));
        }
        if let Some(name) = further.first() {
            return Err(self.refuse(format!(
                "{} beyond the last block that config.json asks for (num_hidden_layers = {}): block {}; \
                 correct the number, or remove them",
                are(&further),
                self.config.layers,
                block(name).unwrap_or_default()
            )));
        }
        if !inside.is_empty() {
            return Err(self.refuse(format!(
                "{} of no part that config.json describes, and without them it is another model; its \
                 config.json belongs to another architecture, or they are to be removed",
                are(&inside)
            )));
        }
        Ok((!outside.is_empty())
            .then(|| format!("{} of no part of the model, and left out", are(&outside))))
    }
}

/// The block that a tensor's name puts it in.
fn block(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("model.layers.")?;
    rest.split('.').next()?.parse().ok()
}

/// `a is`, `a, b are`, `a, b, c and 4 more are`.
fn are(names: &[&str]) -> String {
    let mut text = names
        .iter()
        .take(NAMED)
        .copied()
        .collect::<Vec<_>>()
        .join(", ");
    if names.len() > NAMED {
        text += &format!(" and {} more", names.len() - NAMED);
    }
    match names.len() {
        1 => format!("tensor {text} is"),
        _ => format!("tensors {text} are"),
    }
}

#[cfg(test)]
mod tests;
