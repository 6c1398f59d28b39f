//! Compares the tensors of a checkpoint with those its config requires, from headers alone. Values
//! are read only where they decide: two tensors that may be one, biases that may be zero.
//!
//! The tensors decide whether the head is the embedding, as in Transformers 5: a different head is
//! used whatever `tie_word_embeddings` is, and either of a tied pair may be missing. Transformers
//! drops unknown tensors; here those that would change the model's output are refused, as they were
//! published on purpose.
//!
//! Longer than most: the kinds of tensors that are compared share one list and its reasons.

use std::collections::BTreeSet;
use std::path::Path;

use gptq_format::{Checkpoint, FormatError, LinearShape, QuantizeConfig, layout};
use safetensors::Dtype;

use crate::{LinearSpec, ModelConfig, ModelTensor, Role, SpecError};

/// Maximum number of names in a message; the others are counted.
const NAMED: usize = 3;

/// Tensors that old checkpoints store although the config determines them: rotary tables, attention
/// masks.
const DERIVED: [&str; 7] = [
    ".inv_freq",
    ".original_inv_freq",
    ".cos_cached",
    ".sin_cached",
    ".masked_bias",
    ".position_ids",
    ".attn.bias",
];

/// Scales of an 8-bit cache of some clients, which are not used here.
const CACHE_SCALES: [&str; 4] = [".k_scale", ".v_scale", ".q_scale", ".kv_scale"];

/// A checkpoint that was compared with its config.
pub struct Census {
    /// Config with `tied_embeddings` as the tensors determine it.
    pub config: ModelConfig,
    /// Checkpoint with the embedding available under its own name.
    pub checkpoint: Checkpoint,
    /// Warnings, one sentence each.
    pub warnings: Vec<String>,
    /// First fault that prevents running it.
    pub fault: Option<SpecError>,
}

/// State of the comparison.
struct Counting<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    /// Names of the model's tensors, quantized or not.
    known: BTreeSet<String>,
}

impl Census {
    /// Takes the census of the checkpoint in `dir`.
    ///
    /// # Errors
    /// A config or weights that cannot be read.
    pub fn take(dir: &Path) -> Result<Census, SpecError> {
        let config = ModelConfig::read(&dir.join("config.json"))?;
        let checkpoint = Checkpoint::open(dir)?;
        Ok(Census::of(config, checkpoint))
    }

    /// Takes the census of an open checkpoint.
    pub fn of(config: ModelConfig, checkpoint: Checkpoint) -> Census {
        let mut census = Census {
            config,
            warnings: checkpoint.notes().to_vec(),
            checkpoint,
            fault: None,
        };
        census.settle_names();
        let counted = census.settle_head();
        let counted = counted.and_then(|()| census.settle_experts());
        let counted = counted.and_then(|()| census.count());
        census.fault = counted.err();
        census
    }

    /// Returns the checkpoint and its config, unless the census found a fault.
    ///
    /// # Errors
    /// The fault.
    pub fn sound(self) -> Result<(ModelConfig, Checkpoint), SpecError> {
        match self.fault {
            None => Ok((self.config, self.checkpoint)),
            Some(fault) => Err(fault),
        }
    }

    /// Settles from the tensors which of a family's namings they go by.
    fn settle_names(&mut self) {
        let mut namings = self.config.namings.iter();
        let begins = |stem: &str| self.checkpoint.names().any(|name| name.starts_with(stem));
        let naming = namings.find(|naming| begins(naming.stem));
        self.config.rename(*naming.unwrap_or(&self.config.naming));
    }

    /// Determines from the tensors whether the head is the embedding.
    fn settle_head(&mut self) -> Result<(), SpecError> {
        let has = |name: &str| self.checkpoint.contains(name);
        let head_name = self.config.naming.head;
        let embedding_name = self.config.naming.embedding();
        let embedding_name = embedding_name.as_str();
        match (
            self.config.tied_embeddings,
            has(embedding_name),
            has(head_name),
        ) {
            (true, false, true) => {
                self.checkpoint.serve(embedding_name, head_name);
                Ok(())
            }
            (true, true, true) => {
                let embedding = self.checkpoint.view(embedding_name)?;
                let head = self.checkpoint.view(head_name)?;
                let differs = embedding.shape != head.shape || !embedding.same_values(&head);
                self.checkpoint.give_back(embedding_name);
                self.checkpoint.give_back(head_name);
                if differs {
                    self.config.tied_embeddings = false;
                    self.warnings.push(format!(
                        "{head_name} differs from {embedding_name}, although config.json sets \
                         tie_word_embeddings: it is used as the model's head, as in Transformers, and \
                         branches keep it and set false"
                    ));
                }
                Ok(())
            }
            (false, true, false) if !has(&head_name.replace(".weight", ".qweight")) => Err(self.missing(
                head_name,
                ", and config.json does not set \"tie_word_embeddings\": true, which would make the embedding \
                 the head",
            )),
            (false, false, true) => Err(self.missing(
                embedding_name,
                "; if lm_head.weight is both, set \"tie_word_embeddings\": true in config.json",
            )),
            _ => Ok(()),
        }
    }

    /// Takes tensors apart that have the weights of a block's experts stacked: `gate_up_proj [experts, 2 width,
    /// features]`, the gate's rows first, and `down_proj [experts, features, width]`.
    fn settle_experts(&mut self) -> Result<(), SpecError> {
        for layer in 0..self.config.layers {
            let block = self.config.block(layer).clone();
            for tap in block.taps().filter(|&tap| block.inputs(tap) > 1) {
                let linears = &block.linears()[block.linears_of(tap)];
                let first = &linears[0];
                let path = first.fused_as.as_deref().unwrap_or(&first.name);
                let kind = if block.dispatches(tap) {
                    "gate_up_proj"
                } else {
                    "down_proj"
                };
                let module = first.module(layer);
                let stem = module.strip_suffix(&first.name).unwrap_or_default();
                let stacked = format!("{stem}{path}.{kind}");
                if !self.checkpoint.contains(&stacked) {
                    continue;
                }
                let experts = block.inputs(tap);
                let rows = linears.len() / experts * first.out_features;
                let shape = [experts, rows, first.in_features];
                let part = |linear: &LinearSpec| {
                    let shape = vec![linear.out_features, linear.in_features];
                    (format!("{}.weight", linear.module(layer)), shape)
                };
                let parts = linears.iter().map(part).collect();
                self.checkpoint.divide(&stacked, &shape, parts)?;
            }
        }
        Ok(())
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
        let (carried, warnings) = counting.count()?;
        self.config.carried = carried;
        self.warnings.extend(warnings);
        Ok(())
    }
}

impl Counting<'_> {
    /// Checks every tensor; returns those that are copied as they are, and warnings about them and about those
    /// that are ignored.
    fn count(mut self) -> Result<(Vec<ModelTensor>, Vec<String>), SpecError> {
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

    /// Checks that settings and tensors agree on whether anything is quantized, and by which
    /// method.
    fn method(&self) -> Result<(), SpecError> {
        let quantized = self.checkpoint.quantized_by();
        let mut names = self.checkpoint.names();
        let settings = self.checkpoint.quantize_config();
        let marker = settings.map_or("qweight", |config| {
            layout(config.checkpoint_format, config.sym).marker()
        });
        let packed = names.find(|name| {
            name.strip_suffix(marker)
                .is_some_and(|it| it.ends_with('.'))
        });
        match (settings, quantized) {
            (None, Some((method, name))) => Err(self.refuse(match packed {
                Some(name) => format!(
                    "its weights are already quantized ({name}), and neither quantize_config.json nor \
                     config.json's quantization_config describes how; restore the file that belongs to them, or \
                     use the full-precision model"
                ),
                None => format!(
                    "its weights are already quantized, by {method} ({name}); use the full-precision model \
                     they were quantized from"
                ),
            })),
            (Some(config), _) if packed.is_none() && self.quantizes_any(config)? => {
                let file = match self.checkpoint.dir().join("quantize_config.json").exists() {
                    true => "quantize_config.json",
                    false => "config.json's quantization_config",
                };
                let method = &config.quant_method;
                Err(self.refuse(format!(
                    "{file} says that its linear layers are quantized by {method}, but no tensor is (no {marker}): \
                     if the weights are those of the full-precision model, \
                     remove these settings; otherwise download the quantized weights"
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
                "{} part of an adapter that changes the model; merge it into the weights first (PEFT's \
                 merge_and_unload)",
                are(&found)
            ))),
        }
    }

    /// Checks that every tensor of the config exists, with its shape and a readable dtype.
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

    /// Checks one tensor of the model, or several if it is quantized; returns the errors for
    /// missing ones.
    fn one(&mut self, tensor: &ModelTensor) -> Result<Vec<FormatError>, SpecError> {
        let settings = match (tensor.role, self.checkpoint.quantize_config()) {
            (Role::Linear, Some(config)) => {
                let own = config.module(tensor.module())?;
                own.map(|own| (config, own))
            }
            _ => None,
        };
        let mut missing = Vec::new();
        let mut look = |name: &str, shape: &[usize], int: Option<Dtype>, optional: bool| {
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
                Some(Dtype::I64) => (view.dtype == Dtype::I64, "I64"),
                Some(Dtype::U32) => (view.dtype == Dtype::U32, "U32"),
                Some(_) => (view.dtype == Dtype::I32, "I32"),
                None => (
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
            (Some((config, (bits, group_size))), &[out_features, in_features]) => {
                let linear = LinearShape {
                    in_features,
                    out_features,
                    bits,
                    group_size,
                };
                let format = layout(config.checkpoint_format, config.sym);
                for part in format.parts(&linear) {
                    let name = format.tensor_name(tensor.module(), part.suffix);
                    let optional = format.may_lack(part.suffix, config);
                    let int = Some(part.dtype).filter(|dtype| *dtype != Dtype::F16);
                    look(&name, &part.shape, int, optional)?;
                }
            }
            _ => look(&tensor.name, &tensor.shape, None, false)?,
        }
        // If the dense tensor exists although the settings say quantized.
        let dense = settings.is_some() && self.checkpoint.contains(&tensor.name);
        if let (true, Some(FormatError::MissingTensor { hint, .. })) = (dense, missing.first_mut())
        {
            *hint += &format!(
                " ({} exists, but the settings do not leave it in full precision)",
                tensor.name
            );
        }
        Ok(missing)
    }

    /// Checks every other tensor: those that would change the model are refused, those of a part that is not run
    /// are copied as they are, the rest are ignored.
    fn unknown(&self) -> Result<(Vec<ModelTensor>, Vec<String>), SpecError> {
        let naming = self.config.naming;
        let own = ["layers.", "norm.", "embed_"].map(|part| format!("{}{part}", naming.stem));
        let head = naming.head.trim_end_matches("weight");
        let block = |name: &str| block(naming.stem, name);
        let modules: BTreeSet<String> = (self.known.iter())
            .filter_map(|name| Some(name.rsplit_once('.')?.0.to_owned()))
            .chain([head.trim_end_matches('.').to_owned()])
            .collect();
        let (mut biases, mut further, mut inside, mut outside) = (vec![], vec![], vec![], vec![]);
        let mut carried = Vec::new();
        for name in self.checkpoint.names() {
            let derived = DERIVED.iter().any(|end| name.ends_with(end));
            // Only a tied head is unknown here, and it equals the embedding.
            if self.known.contains(name) || derived || name == naming.head {
                continue;
            }
            let bias = name.strip_suffix(".bias");
            if bias.is_some_and(|module| modules.contains(module)) {
                // Some tools write zero biases for linear layers that have none.
                if !self.checkpoint.view(name)?.is_zero() {
                    biases.push(name);
                }
                self.checkpoint.give_back(name);
            } else if CACHE_SCALES.iter().any(|end| name.ends_with(end)) {
                outside.push(name);
            } else if let Some(past) = block(name).and_then(|it| it.checked_sub(self.config.layers))
            {
                match past < self.config.further {
                    true => carried.push(name),
                    false => further.push(name),
                }
            } else if name.starts_with(head) || own.iter().any(|part| name.starts_with(part)) {
                inside.push(name);
            } else if (self.config.carried_names.iter()).any(|part| name.starts_with(part)) {
                carried.push(name);
            } else {
                outside.push(name);
            }
        }
        if !biases.is_empty() {
            return Err(self.refuse(format!(
                "{} not zero, but config.json gives these linear layers no bias; set \"attention_bias\" or \
                 \"mlp_bias\": true there if the model has them, or remove them",
                are(&biases)
            )));
        }
        if let Some(name) = further.first() {
            return Err(self.refuse(format!(
                "{} beyond the last block of config.json (num_hidden_layers = {}): block {}; \
                 correct the number, or remove them",
                are(&further),
                self.config.layers,
                block(name).unwrap_or_default()
            )));
        }
        if !inside.is_empty() {
            return Err(self.refuse(format!(
                "{} not described by config.json but may change the model; its \
                 config.json belongs to another architecture, or the tensors must be removed",
                are(&inside)
            )));
        }
        let mut warnings = Vec::new();
        if !carried.is_empty() {
            warnings.push(format!(
                "{} part of what is not run, and copied unchanged",
                are(&carried)
            ));
        }
        if !outside.is_empty() {
            warnings.push(format!(
                "{} not part of the model and ignored",
                are(&outside)
            ));
        }
        let carried = carried.into_iter().map(|name| {
            let view = self.checkpoint.view(name)?;
            let role = Role::Carried(view.dtype);
            Ok::<_, SpecError>(ModelTensor::new(name.to_owned(), view.shape, role))
        });
        Ok((carried.collect::<Result<_, _>>()?, warnings))
    }
}

/// Returns the block index in a tensor's name.
fn block(stem: &str, name: &str) -> Option<usize> {
    let rest = name.strip_prefix(stem)?.strip_prefix("layers.")?;
    rest.split('.').next()?.parse().ok()
}

/// Formats `a is`, `a, b are`, `a, b, c and 4 more are`.
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
