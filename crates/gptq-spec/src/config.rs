//! Reads the `config.json` of a Llama-like model, in the spelling of Transformers 4 (`rope_theta`
//! at the top, `torch_dtype`) or 5 (`rope_parameters`, `dtype`). If two keys have the same meaning,
//! Transformers 5 decides which counts (`configuration_*.py`, `modeling_rope_utils.py`), and what a
//! `null` means.
//!
//! Keys common to all families are read here. The files of the families (`families/`) define the
//! defaults of missing keys and describe the blocks.

use std::path::Path;
use std::sync::Arc;

use gptq_format::read_json;
use serde_json::Value;

use crate::families::Family;
use crate::keys::Keys;
use crate::rope_scaling::{RopeScaling, rotary};
use crate::{BlockSpec, Rope, SpecError};

/// Names of the only supported activation.
const SILU: [&str; 2] = ["silu", "swish"];

/// Limit on the blocks, above that of any model. Every linear layer of every block is listed in a
/// plan.
const MAX_LAYERS: usize = 1 << 12;

/// Limit on the parameters, above that of any model; bytes of a model of this size still fit in 64
/// bits.
const MAX_PARAMETERS: u128 = 1 << 48;

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
    /// Returns the context the model was trained for, in tokens.
    pub max_positions: usize,
    /// Epsilon added to the variance in the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Scaling of those frequencies for contexts longer than the original training context.
    pub rope_scaling: RopeScaling,
    /// True if the output projection is the embedding.
    pub tied_embeddings: bool,
    /// Number of tokens that a token sees, itself included, if limited. The forward pass has no
    /// such mask and is valid up to this length.
    pub sliding_window: Option<usize>,
    /// Blocks by layer.
    blocks: Vec<Arc<BlockSpec>>,
}

/// Returns the context the model was trained for, in tokens.
pub(crate) fn max_positions(config: &Keys<'_>) -> Result<usize, String> {
    let key = "max_position_embeddings";
    let found = config.found(key)?.or(Family::of(config)?.default(key));
    found.ok_or_else(|| format!("{key} is missing"))
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
        let config = Keys::new(object);
        let family = Family::of(&config)?;
        if let Some(act) = config.found::<String>("hidden_act")?
            && !SILU.contains(&act.as_str())
        {
            return Err(format!("hidden_act {act:?} is not supported, only silu"));
        }
        let (hidden_size, heads) = (
            config.required("hidden_size")?,
            config.required("num_attention_heads")?,
        );
        let layers = config.required("num_hidden_layers")?;
        let max_positions = max_positions(&config)?;
        let (rope_theta, rope_scaling) = rotary(&config, max_positions)?;
        let nullable = |key| {
            let found = config.nullable(key)?;
            Ok::<Option<usize>, String>(found.unwrap_or(family.default(key)))
        };
        let mut found = ModelConfig {
            hidden_size,
            intermediate_size: config.required("intermediate_size")?,
            layers,
            heads,
            kv_heads: nullable("num_key_value_heads")?.unwrap_or(heads),
            head_dim: match nullable("head_dim")? {
                Some(dim) => dim,
                None => hidden_size
                    .checked_div(heads)
                    .ok_or("num_attention_heads is 0")?,
            },
            vocabulary: config.required("vocab_size")?,
            max_positions,
            rms_norm_eps: config.found("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tied_embeddings: config.found("tie_word_embeddings")?.unwrap_or(false),
            sliding_window: family.sliding_window(&config, layers)?,
            blocks: Vec::new(),
        };
        found.check()?;
        for layer in 0..layers {
            let block = (family.block)(&found, &config, layer)?;
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

    /// Returns the rotary embedding over whole heads.
    pub(crate) fn rope(&self) -> Rope {
        Rope {
            dim: self.head_dim,
            theta: self.rope_theta,
            scaling: self.rope_scaling,
        }
    }

    fn check(&self) -> Result<(), String> {
        for (name, value) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocabulary),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
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
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(format!("rms_norm_eps = {} is negative", self.rms_norm_eps));
        }
        Ok(())
    }

    /// Checks that every token of a window of `tokens` sees all before it, as the forward pass
    /// assumes.
    ///
    /// # Errors
    /// [`SpecError::SlidingWindow`].
    pub fn check_window(&self, tokens: usize) -> Result<(), SpecError> {
        match self.sliding_window {
            Some(sees) if tokens > sees => Err(SpecError::SlidingWindow { tokens, sees }),
            _ => Ok(()),
        }
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

#[cfg(test)]
mod tests;
