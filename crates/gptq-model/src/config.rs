//! `config.json` of a model of the Llama kind, in Transformers 4's spelling (`rope_theta` at the top,
//! `torch_dtype`) or 5's (`rope_parameters`, `dtype`).
//!
//! What all families have is read here. Their files (`families/`) say what a key means that is left out, and
//! describe the blocks.

use std::path::Path;
use std::sync::Arc;

use gptq_format::read_json;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::families::{FAMILIES, Keys};
use crate::rope_scaling::{RopeScaling, scaling};
use crate::{BlockSpec, ModelError, Rope};

/// How a family writes that tokens see only so many before them.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum SlidingWindow {
    /// It has none.
    Never,
    /// `sliding_window`, in every block; off when `null`.
    Always,
    /// `sliding_window` in blocks from `max_window_layers` on, if `use_sliding_window`.
    Switched,
}

/// More blocks than any model has. Every linear of every block is named and planned.
const MAX_LAYERS: usize = 1 << 12;

/// More than any model has; bytes of a model of this size are still counted in 64 bits.
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
    /// Context the model was trained for, in tokens.
    pub max_positions: usize,
    /// Added to the variance in the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How those frequencies are stretched for contexts longer than the first training had.
    pub rope_scaling: RopeScaling,
    /// The output projection is the embedding.
    pub tied_embeddings: bool,
    /// How many tokens one sees, itself included, where that is fewer than all before it. The
    /// forward has no such mask: it is right up to this length.
    pub sliding_window: Option<usize>,
    /// By layer.
    blocks: Vec<Arc<BlockSpec>>,
}

#[derive(Deserialize)]
struct Raw {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    #[serde(default = "silu")]
    hidden_act: String,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    sliding_window: Option<usize>,
    #[serde(default)]
    use_sliding_window: bool,
    max_window_layers: Option<usize>,
}

/// `rope_scaling` or `rope_parameters`.
#[derive(Default, Deserialize)]
pub(crate) struct RawRope {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    pub rope_type: Option<String>,
    pub factor: Option<f64>,
    pub low_freq_factor: Option<f64>,
    pub high_freq_factor: Option<f64>,
    pub original_max_position_embeddings: Option<f64>,
}

fn default_eps() -> f64 {
    1e-6
}

fn silu() -> String {
    "silu".into()
}

impl SlidingWindow {
    fn of(self, raw: &Raw) -> Option<usize> {
        let first = raw.max_window_layers.unwrap_or_default();
        let on = match self {
            SlidingWindow::Never => false,
            SlidingWindow::Always => true,
            SlidingWindow::Switched => raw.use_sliding_window && first < raw.num_hidden_layers,
        };
        raw.sliding_window.filter(|_| on)
    }
}

impl ModelConfig {
    /// Reads `config.json` at `path`.
    ///
    /// Errors on a missing file or key, an unknown `model_type`, activation or rotary scaling, and
    /// on dimensions that do not fit together.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        let value: Value = read_json(path)?;
        Self::from_json(value).map_err(|reason| ModelError::Config {
            path: path.into(),
            reason,
        })
    }

    /// From the parsed object; the error is a sentence.
    pub fn from_json(value: Value) -> Result<Self, String> {
        let Value::Object(mut keys) = value else {
            return Err("it is not an object".into());
        };
        let model_type = keys.get("model_type").ok_or("model_type is missing")?;
        let family = FAMILIES
            .iter()
            .find(|family| model_type == family.model_type)
            .ok_or_else(|| {
                format!(
                    "model_type {model_type} is not supported; known are: {}",
                    FAMILIES
                        .iter()
                        .map(|it| it.model_type)
                        .collect::<Vec<_>>()
                        .join(", ")
                )
            })?;
        for &(key, value) in family.defaults {
            keys.entry(key).or_insert_with(|| json!(value));
        }
        let raw = Raw::deserialize(&Value::Object(keys.clone())).map_err(|e| e.to_string())?;
        if raw.hidden_act != "silu" {
            return Err(format!(
                "hidden_act {:?} is not supported, only silu",
                raw.hidden_act
            ));
        }
        let max_positions = raw.max_position_embeddings;
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let rope_scaling = scaling(rope.unwrap_or(&RawRope::default()), max_positions)?;
        let rope_theta = raw
            .rope_parameters
            .as_ref()
            .and_then(|rope| rope.rope_theta)
            .or(raw.rope_theta)
            .unwrap_or(10_000.0);
        let mut config = ModelConfig {
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads: raw.num_attention_heads,
            kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim: match raw.head_dim {
                Some(dim) => dim,
                None => raw
                    .hidden_size
                    .checked_div(raw.num_attention_heads)
                    .ok_or("num_attention_heads is 0")?,
            },
            vocabulary: raw.vocab_size,
            max_positions,
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta,
            rope_scaling,
            tied_embeddings: raw.tie_word_embeddings,
            sliding_window: family.sliding_window.of(&raw),
            blocks: Vec::new(),
        };
        config.check()?;
        for layer in 0..config.layers {
            let block = (family.block)(&config, &Keys(&keys), layer)?;
            // Most blocks are as the one before, and share its description.
            let block = match config.blocks.last() {
                Some(last) if **last == block => last.clone(),
                _ => Arc::new(block),
            };
            config.blocks.push(block);
        }
        if config.count() > MAX_PARAMETERS {
            return Err("the shapes make a model of over 2^48 parameters".into());
        }
        Ok(config)
    }

    /// The description of block `layer`.
    pub fn block(&self, layer: usize) -> &Arc<BlockSpec> {
        &self.blocks[layer]
    }

    /// The descriptions of all blocks, in order.
    pub fn blocks(&self) -> &[Arc<BlockSpec>] {
        &self.blocks
    }

    /// The rotary embedding over whole heads.
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
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(format!("rope_theta = {} is not positive", self.rope_theta));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return Err(format!("rms_norm_eps = {} is negative", self.rms_norm_eps));
        }
        Ok(())
    }

    /// Checks that every token of a window of `tokens` sees all before it, as the forward has it.
    ///
    /// # Errors
    /// [`ModelError::SlidingWindow`].
    pub fn check_window(&self, tokens: usize) -> Result<(), ModelError> {
        match self.sliding_window {
            Some(sees) if tokens > sees => Err(ModelError::SlidingWindow { tokens, sees }),
            _ => Ok(()),
        }
    }

    /// Dense parameters, embeddings included.
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
