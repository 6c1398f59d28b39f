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
use crate::rope::{RopeScaling, scaling};

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
mod tests {
    use proptest::prelude::*;
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
            (
                "model_type",
                json!("gpt2"),
                "known are: llama, mistral, qwen2",
            ),
            ("hidden_act", json!("gelu"), "gelu"),
            (
                "rope_scaling",
                json!({"rope_type": "yarn"}),
                "rope_type \"yarn\" is not supported; known are: default, linear, llama3",
            ),
            (
                "rope_scaling",
                json!({"type": "linear", "factor": 0}),
                "factor = 0 is not positive",
            ),
            ("rope_scaling", json!({"type": "linear"}), "no factor"),
            (
                "rope_scaling",
                json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
                "no high_freq_factor",
            ),
            (
                "rope_scaling",
                json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}),
                "not above low_freq_factor",
            ),
            ("num_key_value_heads", json!(5), "multiple"),
            ("num_attention_heads", json!(0), "num_attention_heads"),
            ("hidden_size", json!("wide"), "invalid type"),
            ("hidden_size", json!(-1), "invalid value"),
            ("vocab_size", json!(1u64 << 40), "vocab_size"),
            ("num_hidden_layers", json!((1 << 12) + 1), "over 4096"),
            ("head_dim", json!(1 << 24), "2^48"),
            ("rope_theta", json!(0.0), "rope_theta"),
            ("rms_norm_eps", json!(-1e-5), "rms_norm_eps"),
        ] {
            let mut config = llama();
            config[key] = value;
            let error = ModelConfig::from_json(config).unwrap_err();
            assert!(error.contains(word), "{key}: {error}");
        }
    }

    #[test]
    fn both_spellings_of_a_rotary_scaling_are_read() {
        let scaling = |key: &str, rope: Value| {
            let mut config = llama();
            config["max_position_embeddings"] = json!(131_072);
            config[key] = rope;
            ModelConfig::from_json(config).map(|config| config.rope_scaling)
        };
        let llama3 = json!({"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 8192, "rope_type": "llama3"});
        let expected = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 8192.0,
        };
        for key in ["rope_scaling", "rope_parameters"] {
            assert_eq!(scaling(key, llama3.clone()), Ok(expected), "{key}");
        }
        let linear = json!({"type": "linear", "factor": 2});
        let expected = RopeScaling::Linear { factor: 2.0 };
        assert_eq!(scaling("rope_scaling", linear), Ok(expected));
    }

    #[test]
    fn families_differ_in_biases() {
        for (family, qkv, o, mlp) in [
            ("llama", true, true, true),
            ("mistral", false, false, false),
            ("qwen2", true, false, false),
        ] {
            let mut config = llama();
            config["model_type"] = json!(family);
            config["num_key_value_heads"] = json!(8);
            config["attention_bias"] = json!(true);
            config["mlp_bias"] = json!(true);
            let config = ModelConfig::from_json(config).unwrap();
            let found = (config.qkv_bias, config.o_bias, config.mlp_bias);
            assert_eq!(found, (qkv, o, mlp), "{family}");
        }
    }

    #[test]
    fn a_sliding_window_counts_where_the_family_uses_it() {
        let window = |family: &str, keys: Value| {
            let mut config = llama();
            config["model_type"] = json!(family);
            for (key, value) in keys.as_object().unwrap() {
                config[key] = value.clone();
            }
            ModelConfig::from_json(config).map(|config| config.sliding_window)
        };
        for (family, keys, expected) in [
            ("llama", json!({"sliding_window": 512}), None),
            ("mistral", json!({"sliding_window": 512}), Some(512)),
            ("mistral", json!({"sliding_window": null}), None),
            ("mistral", json!({}), Some(4096)),
            ("qwen2", json!({"sliding_window": 512}), None),
            (
                "qwen2",
                json!({"sliding_window": 512, "use_sliding_window": true}),
                Some(512),
            ),
            (
                "qwen2",
                json!({"sliding_window": 512, "use_sliding_window": true, "max_window_layers": 32}),
                None,
            ),
        ] {
            assert_eq!(
                window(family, keys.clone()),
                Ok(expected),
                "{family} {keys}"
            );
        }
        assert!(window("mistral", json!({"sliding_window": 0})).is_err());
    }

    #[test]
    fn windows_up_to_the_sliding_window_are_fine() {
        let mut config = llama();
        config["model_type"] = json!("mistral");
        config["sliding_window"] = json!(512);
        let config = ModelConfig::from_json(config).unwrap();
        assert!(config.check_window(512).is_ok());
        let line = config.check_window(513).unwrap_err().to_string();
        assert!(
            line.contains("513") && line.contains("at most 512"),
            "{line}"
        );
    }

    proptest! {
        #[test]
        fn any_damage_ends_in_shapes_that_can_be_computed_with_or_a_sentence(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            family in prop::sample::select(&["llama", "mistral", "qwen2"][..]),
        ) {
            let mut config = llama();
            config["model_type"] = json!(family);
            let mut bytes = config.to_string().into_bytes();
            for (at, byte) in edits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Ok(value) = serde_json::from_slice(&bytes)
                && let Ok(config) = ModelConfig::from_json(value)
            {
                prop_assert!(config.parameters() > 0);
            }
        }

        #[test]
        fn any_numbers_end_in_shapes_that_can_be_computed_with_or_a_sentence(
            numbers in prop::array::uniform7(prop_oneof![0usize..9, any::<usize>(), (0u32..26).prop_map(|n| 1 << n)]),
        ) {
            let mut config = llama();
            for (key, n) in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "vocab_size"].iter().zip(numbers) {
                config[*key] = json!(n);
            }
            if let Ok(config) = ModelConfig::from_json(config) {
                prop_assert!(config.parameters() > 0);
            }
        }
    }
}
