//! `config.json` of a Llama-family model, in Transformers 4's spelling (`rope_theta` at the top,
//! `torch_dtype`) or 5's (`rope_parameters`, `dtype`).

use std::path::Path;

use gptq_format::read_json;
use serde::Deserialize;
use serde_json::Value;

use crate::ModelError;

/// Model types this crate runs.
const KNOWN: [&str; 1] = ["llama"];

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
    /// The output projection is the embedding.
    pub tied_embeddings: bool,
    /// Biases on the attention's linears.
    pub attention_bias: bool,
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
    #[serde(default = "llama_positions")]
    max_position_embeddings: usize,
    #[serde(default = "llama_eps")]
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
}

#[derive(Deserialize)]
struct Rope {
    rope_theta: Option<f64>,
    #[serde(alias = "type")]
    rope_type: Option<String>,
}

fn llama_positions() -> usize {
    2048
}

fn llama_eps() -> f64 {
    1e-6
}

fn silu() -> String {
    "silu".into()
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
        if !KNOWN.contains(&raw.model_type.as_str()) {
            return Err(format!(
                "model_type {:?} is not supported; known are: {}",
                raw.model_type,
                KNOWN.join(", ")
            ));
        }
        if raw.hidden_act != "silu" {
            return Err(format!(
                "hidden_act {:?} is not supported, only silu",
                raw.hidden_act
            ));
        }
        let scaling = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        if let Some(kind) = scaling.and_then(|rope| rope.rope_type.as_deref())
            && kind != "default"
        {
            return Err(format!("rope_type {kind:?} is not supported, only default"));
        }
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
            kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim: match raw.head_dim {
                Some(dim) => dim,
                None => raw
                    .hidden_size
                    .checked_div(raw.num_attention_heads)
                    .ok_or("num_attention_heads is 0")?,
            },
            vocabulary: raw.vocab_size,
            max_positions: raw.max_position_embeddings,
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta,
            tied_embeddings: raw.tie_word_embeddings,
            attention_bias: raw.attention_bias,
            mlp_bias: raw.mlp_bias,
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
        ] {
            if value == 0 || value > 1 << 24 {
                return Err(format!("{name} = {value} is not between 1 and 2^24"));
            }
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
        Ok(())
    }

    /// Dense parameters, embeddings included.
    pub fn parameters(&self) -> usize {
        let linears: usize = crate::Projection::ALL
            .iter()
            .map(|p| {
                let (n_in, n_out) = p.shape(self);
                n_in * n_out + if p.has_bias(self) { n_out } else { 0 }
            })
            .sum();
        let ends = if self.tied_embeddings { 1 } else { 2 };
        self.layers * (linears + 2 * self.hidden_size)
            + ends * self.vocabulary * self.hidden_size
            + self.hidden_size
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn llama() -> Value {
        json!({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
               "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32017,
               "rms_norm_eps": 1e-5, "torch_dtype": "float16", "rope_theta": 5e5, "rope_scaling": null})
    }

    #[test]
    fn both_spellings_of_the_rotary_base_are_read() {
        let old = ModelConfig::from_json(llama()).unwrap();
        assert_eq!((old.rope_theta, old.kv_heads, old.head_dim), (5e5, 32, 128));
        let mut value = llama();
        value.as_object_mut().unwrap().remove("rope_theta");
        value["rope_parameters"] = json!({"rope_theta": 5e5, "rope_type": "default"});
        assert_eq!(ModelConfig::from_json(value).unwrap(), old);
        assert_eq!(old.parameters(), 6_738_554_880); // Llama-2-7B's count plus 17 rows, twice
    }

    #[test]
    fn what_cannot_be_run_is_refused_by_name() {
        for (key, value, word) in [
            ("model_type", json!("gpt2"), "known are: llama"),
            ("hidden_act", json!("gelu"), "gelu"),
            ("rope_scaling", json!({"rope_type": "yarn"}), "yarn"),
            (
                "rope_scaling",
                json!({"type": "linear", "factor": 2.0}),
                "linear",
            ),
            ("num_key_value_heads", json!(5), "multiple"),
            ("num_attention_heads", json!(0), "num_attention_heads"),
            ("hidden_size", json!("wide"), "invalid type"),
        ] {
            let mut config = llama();
            config[key] = value;
            let error = ModelConfig::from_json(config).unwrap_err();
            assert!(error.contains(word), "{key}: {error}");
        }
    }
}
