//! Families' configs in the spellings that they are published in.

use serde_json::{Value, json};

use crate::{ModelConfig, RopeScaling};

fn llama() -> Value {
    json!({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
           "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32017})
}

/// Returns for each block whether it has a sliding window, and whether it rotates.
fn blocks_of(config: Value) -> (Vec<bool>, Vec<bool>) {
    let config = ModelConfig::from_json(config).unwrap();
    let blocks = config.blocks().iter();
    let blocks = blocks.map(|block| block.attention().unwrap().how.clone());
    let both = blocks.map(|how| (how.window.is_some(), how.rope.is_some()));
    both.unzip()
}

#[test]
fn blocks_slide_and_rotate_by_their_families_patterns() {
    let of = |family: &str, keys: Value| {
        let mut config = llama();
        config["model_type"] = json!(family);
        config["num_hidden_layers"] = json!(4);
        config["num_key_value_heads"] = json!(8);
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        blocks_of(config)
    };
    let (yes, no) = (true, false);
    let three = vec![yes, yes, yes, no];
    for (family, keys, slides, rotates) in [
        ("smollm3", json!({}), vec![no; 4], three.clone()),
        (
            "smollm3",
            json!({"no_rope_layers": [0, 1, 1, 0]}),
            vec![no; 4],
            vec![no, yes, yes, no],
        ),
        ("cohere2", json!({}), three.clone(), three.clone()),
        (
            "cohere2",
            json!({"sliding_window_pattern": 2}),
            vec![yes, no, yes, no],
            vec![yes, no, yes, no],
        ),
        ("gemma2", json!({}), vec![yes, no, yes, no], vec![yes; 4]),
        ("gemma3_text", json!({}), vec![yes; 4], vec![yes; 4]),
        (
            "gemma3_text",
            json!({"sliding_window_pattern": 3}),
            vec![yes, yes, no, yes],
            vec![yes; 4],
        ),
        ("olmo3", json!({}), three.clone(), vec![yes; 4]),
        ("exaone4", json!({}), three.clone(), three.clone()),
        (
            "exaone4",
            json!({"sliding_window": null, "sliding_window_pattern": null}),
            vec![no; 4],
            vec![yes; 4],
        ),
        ("phi3", json!({}), vec![no; 4], vec![yes; 4]),
        (
            "phi3",
            json!({"sliding_window": 2047}),
            vec![yes; 4],
            vec![yes; 4],
        ),
    ] {
        assert_eq!(
            of(family, keys.clone()),
            (slides, rotates),
            "{family} {keys}"
        );
    }
}

#[test]
fn both_spellings_of_two_rotary_bases_are_read() {
    let bases = |family: &str, keys: Value| {
        let mut config = llama();
        config["model_type"] = json!(family);
        config["num_key_value_heads"] = json!(8);
        config.as_object_mut().unwrap().remove("rope_theta");
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        let config = ModelConfig::from_json(config)?;
        let scaled = config.rope.scaling != RopeScaling::Default;
        assert_eq!(config.sliding_rope.scaling, RopeScaling::Default);
        Ok::<_, String>((config.rope.theta, scaled, config.sliding_rope.theta))
    };
    let nested = json!({"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}});
    let linear = json!({"rope_type": "linear", "factor": 8.0});
    for (family, keys, expected) in [
        ("gemma3_text", json!({}), (1e6, false, 1e4)),
        (
            "gemma3_text",
            json!({"rope_theta": 2e6, "rope_local_base_freq": 3e4, "rope_scaling": linear}),
            (2e6, true, 3e4),
        ),
        (
            "gemma3_text",
            json!({"rope_parameters": nested}),
            (2e6, true, 3e4),
        ),
        (
            "olmo3",
            json!({"rope_theta": 5e5, "rope_scaling": linear}),
            (5e5, true, 5e5),
        ),
        ("llama", json!({"rope_theta": 5e5}), (5e5, false, 5e5)),
    ] {
        assert_eq!(bases(family, keys.clone()), Ok(expected), "{family} {keys}");
    }
    let flat = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 2e6}});
    let line = bases("gemma3_text", flat).unwrap_err();
    assert!(
        line.contains("rope_parameters.full_attention is missing"),
        "{line}"
    );
}

#[test]
fn a_part_of_a_head_is_rotated_where_the_family_has_it() {
    let rotated = |family: &str, keys: Value| {
        let mut config = llama();
        config["model_type"] = json!(family);
        config["num_key_value_heads"] = json!(8);
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        ModelConfig::from_json(config).map(|config| config.rope.dim)
    };
    let within = json!({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}});
    for (family, keys, expected) in [
        ("glm4", json!({}), 64),
        ("glm4", json!({"partial_rotary_factor": 0.25}), 32),
        ("glm4", within.clone(), 32),
        ("phi3", json!({}), 128),
        ("phi3", json!({"partial_rotary_factor": 0.75}), 96),
        // As Transformers computes it.
        ("llama", within.clone(), 128),
    ] {
        assert_eq!(
            rotated(family, keys.clone()),
            Ok(expected),
            "{family} {keys}"
        );
    }
    for part in [0.0, 1.5, 0.01] {
        let line = rotated("glm4", json!({"partial_rotary_factor": part})).unwrap_err();
        assert!(line.contains("partial_rotary_factor"), "{line}");
    }
}

#[test]
fn a_language_model_is_found_inside_another_config() {
    let mut text = llama();
    text["model_type"] = json!("gemma3_text");
    text["num_key_value_heads"] = json!(8);
    let config =
        ModelConfig::from_json(json!({"model_type": "gemma3", "text_config": text.clone()}));
    let config = config.unwrap();
    let name = |at: usize| config.tensors()[at].name.clone();
    assert_eq!(name(0), "language_model.model.embed_tokens.weight");
    assert_eq!(
        name(1),
        "language_model.model.layers.0.input_layernorm.weight"
    );
    assert!(config.tied_embeddings && config.wide);
    for (outer, word) in [
        (json!({"model_type": "gemma3"}), "text_config is missing"),
        (
            json!({"model_type": "mistral3", "text_config": {"model_type": "gpt2"}}),
            "text_config.model_type \"gpt2\" is not supported",
        ),
        (
            json!({"model_type": "gemma3", "text_config": {"model_type": "gemma3"}}),
            "text_config.model_type",
        ),
        (
            json!({"model_type": "gemma3", "text_config": {"vocab_size": 1.5}}),
            "text_config.hidden_size is missing",
        ),
    ] {
        let line = ModelConfig::from_json(outer).unwrap_err();
        assert!(line.contains(word), "{line}");
    }
    text["use_bidirectional_attention"] = json!(true);
    let line = ModelConfig::from_json(text).unwrap_err();
    assert!(line.contains("use_bidirectional_attention"), "{line}");
}
