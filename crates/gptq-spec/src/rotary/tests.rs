//! Rotary settings in two spellings, against what Transformers makes of them.

use super::*;
use crate::ModelConfig;

/// Base, and what the scaling divides the slowest frequency by: `config.rope_parameters` and
/// `rotary_emb.inv_freq` in Transformers 5.23.0.
const ROTARY: [(&str, f64, f64); 13] = [
    (r#"{"rope_theta": 5e5}"#, 5e5, 1.0),
    (
        r#"{"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}}"#,
        5e5,
        1.0,
    ),
    (
        r#"{"rope_theta": 5e5, "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}}"#,
        2e4,
        1.0,
    ),
    (
        r#"{"rope_theta": 5e5, "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0}}"#,
        5e5,
        2.0,
    ),
    (
        r#"{"rope_parameters": {"rope_theta": 2e4, "rope_type": "default"},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0}}"#,
        1e4,
        2.0,
    ),
    (
        r#"{"rope_theta": 5e5, "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}}"#,
        3e4,
        2.0,
    ),
    (
        r#"{"rope_theta": 5e5, "rope_scaling": {},
            "rope_parameters": {"rope_theta": 2e4, "rope_type": "linear", "factor": 4.0}}"#,
        2e4,
        4.0,
    ),
    (r#"{"rope_theta": 5e5, "rope_parameters": {}}"#, 5e5, 1.0),
    (
        r#"{"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}"#,
        1e4,
        1.0,
    ),
    (
        r#"{"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 2.0}}"#,
        1e4,
        2.0,
    ),
    (
        r#"{"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}"#,
        1e4,
        2.0,
    ),
    (r#"{"rope_scaling": {"factor": 2.0}}"#, 1e4, 1.0),
    (
        r#"{"original_max_position_embeddings": 128,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}"#,
        1e4,
        8.0,
    ),
];

/// The keys of `ROTARY` in a config that says nothing else of them.
fn rotary(keys: &str) -> Value {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512
    });
    let object = config.as_object_mut().unwrap();
    let keys: Value = serde_json::from_str(keys).unwrap();
    object.extend(keys.as_object().unwrap().clone());
    config
}

#[test]
fn of_two_spellings_that_counts_which_counts_in_transformers() {
    for (keys, theta, divided) in ROTARY {
        let config = ModelConfig::from_json(rotary(keys)).unwrap();
        assert_eq!(config.rope.theta, theta, "{keys}");
        let (dim, scaling) = (config.rope.dim, config.rope.scaling);
        let slow = theta.powf(2.0 / dim as f64 - 1.0) as f32;
        let found = slow / scaling.frequencies(theta, dim, 1)[dim / 2 - 1];
        assert!((found - divided as f32).abs() < 1e-5, "{keys}: {found}");
        if let RopeScaling::Llama3 {
            original_positions, ..
        } = scaling
        {
            assert_eq!(original_positions, 128.0, "{keys}");
        }
    }
}

#[test]
fn a_config_spelt_out_says_the_same_to_who_knows_either_spelling() {
    for (keys, ..) in ROTARY {
        let mut config = rotary(keys);
        let expected = ModelConfig::from_json(config.clone()).unwrap();
        spell_out_rotary(config.as_object_mut().unwrap()).unwrap();
        assert_eq!(
            ModelConfig::from_json(config.clone()),
            Ok(expected.clone()),
            "{keys}"
        );
        // Transformers 4, ExLlamaV2 and others know the first two, some readers the third alone.
        for spellings in [&["rope_theta", "rope_scaling"][..], &["rope_parameters"]] {
            let mut one = config.clone();
            let all = ["rope_theta", "rope_scaling", "rope_parameters"];
            for key in all.iter().filter(|key| !spellings.contains(key)) {
                one.as_object_mut().unwrap().remove(*key);
            }
            assert_eq!(
                ModelConfig::from_json(one),
                Ok(expected.clone()),
                "{keys} {spellings:?}"
            );
        }
        let scaling = &config["rope_scaling"];
        assert_eq!(scaling["type"], scaling["rope_type"], "{keys}");
        assert!(config["rope_theta"].is_number());
    }
}
