//! Families' configs in the spellings that they are published in.

use serde_json::{Value, json};

use super::FAMILIES;
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
    // Whichever of the two says it.
    let outer = json!({"model_type": "mistral3", "is_causal": false, "text_config": text.clone()});
    let line = ModelConfig::from_json(outer).unwrap_err();
    assert_eq!(line, "is_causal = false is not supported");
    text["use_bidirectional_attention"] = json!(true);
    let line = ModelConfig::from_json(text).unwrap_err();
    assert!(line.contains("use_bidirectional_attention"), "{line}");
}

/// The error of a config of `family`, with these keys in its language model's.
fn refused(family: &str, keys: &Value) -> String {
    let family = FAMILIES.iter().find(|it| it.model_type == family).unwrap();
    let mut text = llama();
    text["num_key_value_heads"] = json!(8);
    text["num_hidden_layers"] = json!(2);
    for (key, value) in keys.as_object().unwrap() {
        text[key] = value.clone();
    }
    let config = match &family.inside {
        None => {
            text["model_type"] = json!(family.model_type);
            text
        }
        Some(inside) => {
            text["model_type"] = json!(inside.model_type);
            json!({"model_type": family.model_type, inside.key: text})
        }
    };
    let line = ModelConfig::from_json(config).expect_err(family.model_type);
    assert!(!line.contains('\n'), "{line}");
    line
}

#[test]
fn what_no_block_computes_is_refused_by_its_key_in_every_family() {
    for family in FAMILIES {
        let text = match &family.inside {
            None => family,
            Some(inside) => super::named(inside.model_type, "").unwrap(),
        };
        let act = text.activation.0;
        let rope = json!({"rope_type": "mrope", "mrope_section": [16, 24, 24], "factor": 2});
        for (key, value, words) in [
            (act, json!("relu"), "\"relu\" is not supported, only "),
            (
                "rope_scaling",
                rope,
                "rope_scaling.rope_type \"mrope\" is not supported; known are: ",
            ),
            (
                "is_causal",
                json!(false),
                "is_causal = false is not supported",
            ),
            (
                "per_layer_config",
                json!({"0": {"rms_norm_eps": 0.5}}),
                "per_layer_config is not supported",
            ),
        ] {
            let line = refused(family.model_type, &json!({key: value}));
            assert!(
                line.contains(key) && line.contains(words),
                "{}: {line}",
                family.model_type
            );
        }
        let nothing = json!({"is_causal": null, "per_layer_config": null});
        let mut config = llama();
        config["model_type"] = json!(text.model_type);
        config["num_key_value_heads"] = json!(8);
        config
            .as_object_mut()
            .unwrap()
            .extend(nothing.as_object().unwrap().clone());
        assert!(
            ModelConfig::from_json(config).is_ok(),
            "{}",
            family.model_type
        );
    }
}

#[test]
fn what_transformers_passes_over_or_fails_on_is_refused_rather_than_guessed() {
    let off = "sliding_window is off, and layer_types does not say";
    let types = json!({"sliding_window": 8, "layer_types": ["full_attention", "full_attention"]});
    for (family, keys, words) in [
        (
            "gemma2",
            json!({"use_bidirectional_attention": true}),
            "use_bidirectional_attention = true",
        ),
        (
            "gemma3",
            json!({"final_logit_softcapping": 30.0}),
            "text_config.final_logit_softcapping is not",
        ),
        (
            "gemma3_text",
            json!({"attn_logit_softcapping": 50.0}),
            "attn_logit_softcapping is not",
        ),
        (
            "gemma3_text",
            json!({"rope_scaling": {"type": "linear", "factor": 8.0}}),
            "rope_scaling.type is not",
        ),
        (
            "olmo3",
            json!({"rope_scaling": {"type": "linear", "factor": 8.0}}),
            "write rope_type",
        ),
        ("phi3", types.clone(), "layer_types is not supported"),
        (
            "mistral3",
            types,
            "text_config.layer_types is not supported",
        ),
        (
            "cohere2",
            json!({"sliding_window_pattern": 0}),
            "sliding_window_pattern = 0 is not positive",
        ),
        (
            "gemma3",
            json!({"sliding_window_pattern": 0}),
            "text_config.sliding_window_pattern = 0",
        ),
        (
            "exaone4",
            json!({"sliding_window_pattern": "LLLG"}),
            "sliding_window_pattern: \"LLLG\" is not",
        ),
        (
            "exaone4",
            json!({"sliding_window_pattern": null}),
            "sliding_window_pattern: null is not",
        ),
        ("exaone4", json!({"sliding_window": 0}), off),
        ("cohere2", json!({"sliding_window": null}), off),
        ("gemma2", json!({"sliding_window": 0}), off),
        ("olmo3", json!({"sliding_window": null}), off),
        (
            "smollm3",
            json!({"no_rope_layer_interval": 0}),
            "no_rope_layer_interval = 0 is not positive",
        ),
        (
            "smollm3",
            json!({"no_rope_layers": [1]}),
            "no_rope_layers has 1 entries",
        ),
        (
            "smollm3",
            json!({"use_sliding_window": true, "sliding_window": 8}),
            "layer_types is missing, which use_sliding_window needs",
        ),
        (
            "mixtral",
            json!({"num_experts_per_tok": 9}),
            "num_experts_per_tok = 9 is not between 1 and num_local_experts = 8",
        ),
        (
            "qwen3_moe",
            json!({"num_experts": 8, "num_local_experts": 16}),
            "num_experts = 8 and num_local_experts = 16 disagree",
        ),
        (
            "olmoe",
            json!({"num_experts": 0}),
            "num_experts = 0 is not between 1",
        ),
        (
            "olmoe",
            json!({"clip_qkv": 8.0}),
            "clip_qkv is not supported",
        ),
        (
            "qwen3_moe",
            json!({"use_sliding_window": true}),
            "use_sliding_window = true is not supported",
        ),
        (
            "qwen2_moe",
            json!({"decoder_sparse_step": 0}),
            "decoder_sparse_step = 0 is not positive",
        ),
        (
            "qwen2_moe",
            json!({"moe_intermediate_size": 0}),
            "moe_intermediate_size = 0",
        ),
        (
            "glm4_moe",
            json!({"n_group": 8}),
            "n_group = 8 is not supported, only 1",
        ),
        (
            "granite",
            json!({"residual_multiplier": 0}),
            "residual_multiplier = 0 is not positive",
        ),
        (
            "seed_oss",
            json!({"attention_out_bias": null}),
            "attention_out_bias: null",
        ),
    ] {
        let line = refused(family, &keys);
        assert!(line.contains(words), "{family} {keys}: {line}");
    }
}

#[test]
fn model_types_that_are_not_known_are_refused_with_those_that_are() {
    let mut config = llama();
    for (model_type, outer) in [
        ("ministral3", None),
        ("gemma", None),
        ("ministral3", Some("mistral3")),
    ] {
        config["model_type"] = json!(model_type);
        let (config, key) = match outer {
            None => (config.clone(), "model_type"),
            Some(outer) => (
                json!({"model_type": outer, "text_config": config}),
                "text_config.model_type",
            ),
        };
        let line = ModelConfig::from_json(config).unwrap_err();
        let known: Vec<&str> = crate::model_types().collect();
        let known = known.join(", ");
        assert_eq!(
            line,
            format!("{key} {model_type:?} is not supported; known are: {known}")
        );
    }
}

#[test]
fn blocks_have_experts_by_their_families_keys() {
    let of = |family: &str, keys: Value| {
        let mut config = llama();
        config["model_type"] = json!(family);
        config["num_hidden_layers"] = json!(4);
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        let config = ModelConfig::from_json(config).unwrap();
        let blocks = config.blocks().iter();
        blocks
            .map(|block| match block.has_experts() {
                true => block.inputs(block.taps().end - 1),
                false => 0,
            })
            .collect::<Vec<_>>()
    };
    for (family, keys, expected) in [
        ("mixtral", json!({}), [8; 4]),
        ("mixtral", json!({"num_local_experts": 4}), [4; 4]),
        ("qwen3_moe", json!({}), [128; 4]),
        ("qwen3_moe", json!({"num_local_experts": 16}), [16; 4]),
        (
            "qwen3_moe",
            json!({"num_experts": 16, "mlp_only_layers": [1]}),
            [16, 0, 16, 16],
        ),
        (
            "qwen3_moe",
            json!({"num_experts": 16, "decoder_sparse_step": 2}),
            [0, 16, 0, 16],
        ),
        ("qwen2_moe", json!({"mlp_only_layers": null}), [60; 4]),
        ("olmoe", json!({}), [64; 4]),
        ("glm4_moe", json!({}), [0, 128, 128, 128]),
        (
            "glm4_moe",
            json!({"first_k_dense_replace": 3, "n_routed_experts": 16}),
            [0, 0, 0, 16],
        ),
    ] {
        assert_eq!(of(family, keys.clone()), expected, "{family} {keys}");
    }
}
