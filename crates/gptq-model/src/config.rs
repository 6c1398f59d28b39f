//! `config.json` of a model of the Llama kind, in Transformers 4's spelling (`rope_theta` at the top,
//! `torch_dtype`) or 5's (`rope_parameters`, `dtype`).
//!
//! The families share tensor names and the forward; what differs is in [`Family`]: biases, a sliding
//! window, and what a key means that is left out (Transformers' `configuration_*.py`).

use std::path::Path;

use gptq_format::read_json;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::ModelError;
use crate::rope_scaling::{RopeScaling, scaling};

/// A `model_type`, and what its config does not spell out.
struct Family {
    model_type: &'static str,
    /// `max_position_embeddings` where it is left out.
    max_positions: usize,
    /// `num_key_value_heads` where it is left out; `None`: as many as query heads.
    kv_heads: Option<usize>,
    /// Whether keys decide on biases (`attention_bias`, `mlp_bias`). Where not, only q, k and v may
    /// have them, according to `qkv_bias`.
    bias_keys: bool,
    qkv_bias: bool,
    sliding_window: SlidingWindow,
}

/// How a family writes that tokens see only so many before them.
#[derive(Clone, Copy, PartialEq)]
enum SlidingWindow {
    /// It has none.
    Never,
    /// `sliding_window`, in every block; off when `null`.
    Always,
    /// `sliding_window` in blocks from `max_window_layers` on, if `use_sliding_window`.
    Switched,
}

/// Model types this crate runs.
const FAMILIES: [Family; 3] = [
    Family {
        model_type: "llama",
        max_positions: 2048,
        kv_heads: None,
        bias_keys: true,
        qkv_bias: false,
        sliding_window: SlidingWindow::Never,
    },
    Family {
        model_type: "mistral",
        max_positions: 131_072,
        kv_heads: Some(8),
        bias_keys: false,
        qkv_bias: false,
        sliding_window: SlidingWindow::Always,
    },
    Family {
        model_type: "qwen2",
        max_positions: 32_768,
        kv_heads: Some(32),
        bias_keys: false,
        qkv_bias: true,
        sliding_window: SlidingWindow::Switched,
    },
];

/// `sliding_window` and `max_window_layers` where they are left out, in either family that has them.
const DEFAULT_SLIDING_WINDOW: usize = 4096;
const DEFAULT_MAX_WINDOW_LAYERS: usize = 28;

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
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// A bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases on the feed-forward's linears.
    pub mlp_bias: bool,
}

#[derive(Deserialize)]
struct Raw {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: Option<usize>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    #[serde(default = "silu")]
    hidden_act: String,
    rope_theta: Option<f64>,
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    /// `Some(None)`: `null`, which switches it off.
    #[serde(default, deserialize_with = "present")]
    sliding_window: Option<Option<usize>>,
    #[serde(default)]
    use_sliding_window: bool,
    max_window_layers: Option<usize>,
}

/// `rope_scaling` or `rope_parameters`.
#[derive(Default, Deserialize)]
pub(crate) struct Rope {
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

fn present<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Option<usize>>, D::Error> {
    Option::deserialize(value).map(Some)
}

fn silu() -> String {
    "silu".into()
}

impl Family {
    fn sliding_window(&self, raw: &Raw) -> Option<usize> {
        let first = raw.max_window_layers.unwrap_or(DEFAULT_MAX_WINDOW_LAYERS);
        let on = match self.sliding_window {
            SlidingWindow::Never => false,
            SlidingWindow::Always => true,
            SlidingWindow::Switched => raw.use_sliding_window && first < raw.num_hidden_layers,
        };
        match on {
            true => raw.sliding_window.unwrap_or(Some(DEFAULT_SLIDING_WINDOW)),
            false => None,
        }
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
        let raw: Raw = serde_json::from_value(value).map_err(|e| e.to_string())?;
        let family = FAMILIES
            .iter()
            .find(|family| family.model_type == raw.model_type)
            .ok_or_else(|| {
                format!(
                    "model_type {:?} is not supported; known are: {}",
                    raw.model_type,
                    FAMILIES.map(|family| family.model_type).join(", ")
                )
            })?;
        if raw.hidden_act != "silu" {
            return Err(format!(
                "hidden_act {:?} is not supported, only silu",
                raw.hidden_act
            ));
        }
        let max_positions = raw.max_position_embeddings.unwrap_or(family.max_positions);
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let rope_scaling = scaling(rope.unwrap_or(&Rope::default()), max_positions)?;
        let rope_theta = raw
            .rope_parameters
            .as_ref()
            .and_then(|rope| rope.rope_theta)
            .or(raw.rope_theta)
            .unwrap_or(10_000.0);
        let config = ModelConfig {
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads: raw.num_attention_heads,
            kv_heads: raw
                .num_key_value_heads
                .or(family.kv_heads)
                .unwrap_or(raw.num_attention_heads),
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
            sliding_window: family.sliding_window(&raw),
            qkv_bias: match family.bias_keys {
                true => raw.attention_bias,
                false => family.qkv_bias,
            },
            o_bias: family.bias_keys && raw.attention_bias,
            mlp_bias: family.bias_keys && raw.mlp_bias,
        };
        config.check()?;
        Ok(config)
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
        if self.count() > MAX_PARAMETERS {
            return Err("the shapes make a model of over 2^48 parameters".into());
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
        let wide = |n: usize| n as u128;
        let linears: u128 = crate::Projection::ALL
            .iter()
            .map(|p| {
                let (n_in, n_out) = p.shape(self);
                wide(n_in) * wide(n_out) + if p.has_bias(self) { wide(n_out) } else { 0 }
            })
            .sum();
        let (hidden, vocabulary) = (wide(self.hidden_size), wide(self.vocabulary));
        let ends = if self.tied_embeddings { 1 } else { 2 };
        wide(self.layers) * (linears + 2 * hidden) + ends * vocabulary * hidden + hidden
    }
}

#[cfg(test)]
mod tests;
