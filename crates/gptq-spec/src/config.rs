//! Reads the `config.json` of a Llama-like model, in the spelling of Transformers 4 (`rope_theta`
//! at the top, `torch_dtype`) or 5 (`rope_parameters`, `dtype`). If two keys have the same meaning,
//! Transformers 5 decides which counts (`configuration_*.py`, `modeling_rope_utils.py`), and what a
//! `null` means.
//!
//! Keys common to all families are read here. The files of the families (`families/`) define the
//! defaults of missing keys and describe the blocks.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use gptq_format::read_json;
use serde_json::Value;

use crate::families::{Ends, Family, Naming, family_of, language_model};
use crate::keys::Keys;
use crate::rotary::{RotarySettings, max_positions, rotary};
use crate::shapes::Shapes;
use crate::{BlockSpec, LlamaCpp, ModelTensor, Norm, Role, Rope, RopeScaling, SpecError};

/// Limit on the blocks, above that of any model. Every linear layer of every block is listed in a
/// plan.
const MAX_LAYERS: usize = 1 << 12;

/// Limit on the parameters, above that of any model; bytes of a model of this size still fit in 64
/// bits.
const MAX_PARAMETERS: u128 = 1 << 48;

/// Name of the blocks after those that are run, among the parts whose tensors are kept.
const FURTHER: &str = "further blocks";

/// Shapes and constants of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Width of the hidden states.
    pub hidden_size: usize,
    /// Width inside the feed-forward.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Features per head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// The context that the model was trained for, in tokens.
    pub max_positions: usize,
    /// The final norm, and most of those in blocks.
    pub norm: Norm,
    /// The rotary embedding of blocks in which tokens see all before them.
    pub rope: Rope,
    /// The rotary embedding of blocks with a sliding window; in most families the same.
    pub sliding_rope: Rope,
    /// True if the output projection is the embedding.
    pub tied_embeddings: bool,
    /// True if hidden states usually exceed the range of f16.
    pub wide: bool,
    /// Operations before the first block and after the last.
    pub ends: Ends,
    /// The family in llama.cpp, if it is there.
    pub(crate) llama_cpp: Option<LlamaCpp>,
    /// Names of its tensors, of those that the family has.
    pub naming: Naming,
    pub(crate) namings: &'static [Naming],
    /// Prefixes of the names of tensors that are kept as they are.
    pub(crate) carried_names: &'static [&'static str],
    /// Number of blocks after those that are run; their tensors are kept as they are too.
    pub(crate) further: usize,
    /// Such tensors, as a census found them.
    pub carried: Vec<ModelTensor>,
    /// Descriptions of the blocks, by layer.
    blocks: Vec<Arc<BlockSpec>>,
}

impl ModelConfig {
    /// Reads `config.json` at `path`.
    ///
    /// Errors on a missing file or key, an unknown `model_type`, activation or rotary scaling, and
    /// on inconsistent dimensions.
    pub fn read(path: &Path) -> Result<Self, SpecError> {
        let value: Value = read_json(path)?;
        Self::from_json(value).map_err(|reason| SpecError::Config {
            path: path.into(),
            reason,
        })
    }

    /// Parses the object; the error is a sentence that names the key.
    pub fn from_json(value: Value) -> Result<Self, String> {
        let object = value.as_object().ok_or("not an object")?;
        let outer = family_of(&Keys::new(object))?;
        let (config, family) = language_model(outer, Keys::new(object))?;
        let (key, known) = family.activation;
        if let Some(act) = config.found::<String>(key)?
            && !known.contains(&act.as_str())
        {
            let name = config.name(key);
            return Err(format!(
                "{name} {act:?} is not supported, only {}",
                known[0]
            ));
        }
        for key in outer.refused.iter().chain(family.refused) {
            empty(&config, key)?;
        }
        for keys in [&Keys::new(object), &config] {
            empty(keys, "per_layer_config")?;
            causal(keys)?;
        }
        let (hidden_size, heads): (usize, usize) = (
            config.required("hidden_size")?,
            config.required("num_attention_heads")?,
        );
        let layers = config.required("num_hidden_layers")?;
        let max_positions = max_positions(&config, family)?;
        let ropes = rotary(&config, family, max_positions)?;
        let nullable = |key| {
            let found = config.nullable(key)?;
            Ok::<Option<usize>, String>(found.unwrap_or(family.default(key)))
        };
        let head_dim = match nullable("head_dim")? {
            Some(dim) => dim,
            None => hidden_size
                .checked_div(heads)
                .ok_or("num_attention_heads is 0")?,
        };
        let [rope, sliding_rope] = ropes.map(|it| rope(it, head_dim, family));
        let (eps, default) = family.eps;
        let mut found = ModelConfig {
            hidden_size,
            intermediate_size: config.required("intermediate_size")?,
            layers,
            heads,
            kv_heads: nullable("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            vocabulary: config.required("vocab_size")?,
            max_positions,
            norm: family.norm(config.found(eps)?.unwrap_or(default)),
            rope,
            sliding_rope,
            tied_embeddings: outer.tied(&Keys::new(object))?,
            wide: family.wide,
            ends: Ends::PLAIN,
            llama_cpp: family.llama_cpp,
            naming: outer.naming[0],
            namings: outer.naming,
            carried_names: outer.carried,
            further: family.further(&config)?,
            carried: Vec::new(),
            blocks: Vec::new(),
        };
        found.check(eps)?;
        let shapes = Shapes {
            hidden_size,
            intermediate_size: found.intermediate_size,
            heads,
            kv_heads: found.kv_heads,
            head_dim,
            norm: found.norm,
            rope: found.rope.clone(),
            sliding_rope: found.sliding_rope.clone(),
            windows: family.windows(&config, layers)?,
        };
        if let Some(window) = shapes.windows.iter().flatten().find(|&&it| it > 1 << 24) {
            return Err(format!("sliding_window = {window} is over 2^24"));
        }
        found.ends = (family.ends)(&shapes, &config)?;
        for layer in 0..layers {
            let block = (family.block)(&shapes, &config, layer)?.under(found.naming.stem);
            // Most blocks equal the previous one and share its description.
            let block = match found.blocks.last() {
                Some(last) if **last == block => last.clone(),
                _ => Arc::new(block),
            };
            found.blocks.push(block);
        }
        if found.count() > MAX_PARAMETERS {
            return Err("the shapes make a model of over 2^48 parameters".into());
        }
        Ok(found)
    }

    /// Returns the description of block `layer`.
    pub fn block(&self, layer: usize) -> &Arc<BlockSpec> {
        &self.blocks[layer]
    }

    /// Returns the descriptions of all blocks, in order.
    pub fn blocks(&self) -> &[Arc<BlockSpec>] {
        &self.blocks
    }

    /// Returns the prefixes that module names of its blocks may have before `layers`: one, or several that
    /// programs treat as the same.
    pub fn stems(&self) -> impl Iterator<Item = &'static str> {
        self.namings.iter().map(|naming| naming.stem)
    }

    /// Returns how many tensors are kept as they are, by the module at the top that they belong to.
    pub fn carried_parts(&self) -> BTreeMap<&'static str, usize> {
        let mut parts = BTreeMap::new();
        for tensor in &self.carried {
            let mut names = self.carried_names.iter();
            let part = names.find(|part| tensor.name.starts_with(**part));
            *parts
                .entry(part.unwrap_or(&FURTHER).trim_end_matches('.'))
                .or_default() += 1;
        }
        parts
    }

    /// The same model with its tensors named in another way.
    pub(crate) fn rename(&mut self, naming: Naming) {
        if naming != self.naming {
            self.naming = naming;
            for block in &mut self.blocks {
                *block = Arc::new((**block).clone().under(naming.stem));
            }
        }
    }

    /// Every tensor, in model order; in the end those that a census found and that are not run.
    pub fn tensors(&self) -> Vec<ModelTensor> {
        let hidden = self.hidden_size;
        let table = [self.vocabulary, hidden];
        let naming = self.naming;
        let embedding = naming.embedding();
        let mut all = vec![ModelTensor::new(embedding, &table, Role::Embedding)];
        for layer in 0..self.layers {
            all.extend(self.block_tensors(layer));
        }
        all.push(ModelTensor::new(naming.norm(), &[hidden], Role::Vector));
        if !self.tied_embeddings {
            all.push(ModelTensor::new(naming.head.into(), &table, Role::Head));
        }
        all.extend_from_slice(&self.carried);
        all
    }

    /// Returns the tensors of block `layer`.
    pub fn block_tensors(&self, layer: usize) -> Vec<ModelTensor> {
        let block = self.block(layer);
        let vectors = block.vectors().iter().map(|vector| {
            let name = format!("{}.weight", vector.module(layer));
            ModelTensor::new(name, &[vector.len], Role::Vector)
        });
        let linears = block.linears().iter().flat_map(|linear| {
            let module = linear.module(layer);
            let (n_in, n_out) = linear.shape();
            let weight = ModelTensor::new(format!("{module}.weight"), &[n_out, n_in], Role::Linear);
            let bias = || ModelTensor::new(format!("{module}.bias"), &[n_out], Role::Vector);
            [Some(weight), linear.bias.then(bias)].into_iter().flatten()
        });
        let matrices = block.matrices().iter().flat_map(|matrix| {
            let weight = ModelTensor::new(matrix.weight(layer), &matrix.shape, Role::Matrix);
            let correction = matrix.correction(layer);
            let correction =
                correction.map(|name| ModelTensor::new(name, &matrix.shape[..1], Role::Wide));
            [Some(weight), correction].into_iter().flatten()
        });
        vectors.chain(matrices).chain(linears).collect()
    }

    fn check(&self, eps: &str) -> Result<(), String> {
        for (name, value) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocabulary),
        ] {
            if value == 0 || value > 1 << 24 {
                return Err(format!("{name} = {value} is not between 1 and 2^24"));
            }
        }
        if self.layers > MAX_LAYERS {
            let layers = self.layers;
            return Err(format!("num_hidden_layers = {layers} is over {MAX_LAYERS}"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "num_attention_heads = {} is not a multiple of num_key_value_heads = {}",
                self.heads, self.kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(format!("head_dim = {} is odd", self.head_dim));
        }
        let norm = self.norm.eps;
        if !(norm.is_finite() && norm >= 0.0) {
            return Err(format!("{eps} = {norm} is negative"));
        }
        [&self.rope, &self.sliding_rope]
            .into_iter()
            .try_for_each(check_rope)
    }

    /// Returns the number of dense parameters, embeddings included.
    pub fn parameters(&self) -> usize {
        // Checked to be at most `MAX_PARAMETERS` when the config was read.
        self.count() as usize
    }

    fn count(&self) -> u128 {
        let blocks: u128 = self.blocks.iter().map(|block| block.parameters()).sum();
        let (hidden, vocabulary) = (self.hidden_size as u128, self.vocabulary as u128);
        let ends = if self.tied_embeddings { 1 } else { 2 };
        blocks + ends * vocabulary * hidden + hidden
    }
}

/// Refuses a key that is there and not `null`.
fn empty(config: &Keys<'_>, key: &str) -> Result<(), String> {
    match config.value(key) {
        None | Some(Value::Null) => Ok(()),
        Some(_) => Err(format!("{} is not supported, only null", config.name(key))),
    }
}

/// Refuses attention in which tokens see those after them.
fn causal(config: &Keys<'_>) -> Result<(), String> {
    match config.nullable("is_causal")? {
        Some(Some(false)) => Err(format!(
            "{} = false is not supported",
            config.name("is_causal")
        )),
        _ => Ok(()),
    }
}

/// The rotary embedding of heads of `dim` features.
fn rope(settings: RotarySettings, dim: usize, family: &Family) -> Rope {
    Rope {
        dim: (dim as f64 * settings.partial) as usize,
        theta: settings.theta,
        scaling: settings.scaling,
        interleaved: family.rotary.interleaved,
    }
}

fn check_rope(rope: &Rope) -> Result<(), String> {
    let dim = rope.dim;
    if dim == 0 || !dim.is_multiple_of(2) {
        return Err(format!(
            "partial_rotary_factor rotates {dim} features of a head, which is not an even number"
        ));
    }
    match &rope.scaling {
        RopeScaling::Dynamic { .. } if dim == 2 => {
            Err("rope_type \"dynamic\" needs heads of more than 2 features".to_owned())
        }
        RopeScaling::LongRope { short, long, .. }
            if [short, long].iter().any(|list| list.len() != dim / 2) =>
        {
            Err(format!(
                "short_factor has {} numbers and long_factor {}, where {} frequencies are",
                short.len(),
                long.len(),
                dim / 2
            ))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
