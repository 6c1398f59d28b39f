//! Real configs, and refused ones.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::families::FAMILIES;

fn llama() -> Value {
    json!({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
           "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32017,
           "rms_norm_eps": 1e-5, "torch_dtype": "float16", "rope_theta": 5e5, "rope_scaling": null})
}

#[test]
fn both_spellings_of_the_rotary_base_are_read() {
    let old = ModelConfig::from_json(llama()).unwrap();
    assert_eq!((old.rope.theta, old.kv_heads, old.head_dim), (5e5, 32, 128));
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
            "known are: cohere2, exaone4, gemma2, gemma3, gemma3_text, glm4, glm4_moe, granite, llama,",
        ),
        ("hidden_act", json!("gelu"), "gelu"),
        (
            "rope_scaling",
            json!({"rope_type": "su"}),
            "rope_type \"su\" is not supported; known are: default, linear, dynamic, yarn, longrope, llama3",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "longrope", "factor": 4, "short_factor": [1.0]}),
            "rope_scaling.long_factor is missing",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "longrope", "factor": 4, "short_factor": [1.0], "long_factor": [2.0]}),
            "short_factor has 1 numbers and long_factor 1, where 64 frequencies are",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "longrope", "factor": 4, "short_factor": [0.0], "long_factor": 2}),
            "rope_scaling.short_factor has what is not positive",
        ),
        (
            "rope_scaling",
            json!({"type": "linear", "factor": 0}),
            "rope_scaling.factor = 0 is not positive",
        ),
        (
            "rope_scaling",
            json!({"type": "linear"}),
            "rope_scaling.factor is missing",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}),
            "rope_scaling.high_freq_factor is missing",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}),
            "not above low_freq_factor",
        ),
        (
            "rope_scaling",
            json!({"rope_type": null, "type": "linear", "factor": 2}),
            "rope_scaling.rope_type: null",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "mrope", "type": "default"}),
            "rope_scaling.rope_type \"mrope\" is not supported",
        ),
        (
            "rope_scaling",
            json!("linear"),
            "rope_scaling: \"linear\" is not an object",
        ),
        (
            "rope_scaling",
            json!({"type": "linear", "factor": {"__float__": "NaN"}}),
            "rope_scaling.factor: NaN is not a number",
        ),
        (
            "rope_scaling",
            json!({"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}),
            "rope_scaling.partial_rotary_factor = 0.5",
        ),
        (
            "rope_parameters",
            json!({"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e4}}),
            "rope_parameters.full_attention: rotary settings of their own for some blocks",
        ),
        ("num_key_value_heads", json!(5), "multiple"),
        ("num_attention_heads", json!(0), "num_attention_heads"),
        (
            "hidden_size",
            json!("wide"),
            "hidden_size: \"wide\" is not a whole number",
        ),
        (
            "hidden_size",
            json!(-1),
            "hidden_size: -1 is not a whole number",
        ),
        (
            "hidden_size",
            json!(64.0),
            "hidden_size: 64.0 is not a whole number",
        ),
        ("intermediate_size", json!(null), "intermediate_size: null"),
        (
            "attention_bias",
            json!(null),
            "attention_bias: null is not true or false",
        ),
        ("mlp_bias", json!(0), "mlp_bias: 0 is not true or false"),
        (
            "tie_word_embeddings",
            json!(null),
            "tie_word_embeddings: null",
        ),
        (
            "max_position_embeddings",
            json!(null),
            "max_position_embeddings: null",
        ),
        (
            "rms_norm_eps",
            json!(null),
            "rms_norm_eps: null is not a number",
        ),
        (
            "rms_norm_eps",
            json!({"__float__": "Infinity"}),
            "rms_norm_eps: Infinity is not a number",
        ),
        (
            "rope_theta",
            json!("5e5"),
            "rope_theta: \"5e5\" is not a number",
        ),
        (
            "rope_theta",
            json!(null),
            "rope_theta: null is not a number",
        ),
        ("hidden_act", json!(null), "hidden_act: null is not a text"),
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
        ModelConfig::from_json(config).map(|config| config.rope.scaling)
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
        assert_eq!(scaling(key, llama3.clone()), Ok(expected.clone()), "{key}");
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
        let linears = config.block(0).linears().iter();
        let found: Vec<bool> = linears.map(|linear| linear.bias).collect();
        assert_eq!(found, [qkv, qkv, qkv, o, mlp, mlp, mlp], "{family}");
    }
}

/// Returns the smallest sliding window of all blocks, in tokens; `None` if no block has one.
fn window_of(config: &ModelConfig) -> Option<usize> {
    let blocks = config.blocks().iter();
    let windows = blocks.filter_map(|block| block.attention().unwrap().how.window);
    windows.min()
}

#[test]
fn a_sliding_window_counts_where_the_family_uses_it() {
    let window = |family: &str, keys: Value| {
        let mut config = llama();
        config["model_type"] = json!(family);
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        ModelConfig::from_json(config).map(|config| window_of(&config))
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
}

#[test]
fn layer_types_decide_over_what_else_is_said_of_a_window() {
    let window = |family: &str, keys: Value| {
        let mut config = llama();
        config["model_type"] = json!(family);
        config["num_hidden_layers"] = json!(3);
        config["num_key_value_heads"] = json!(8);
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        ModelConfig::from_json(config).map(|config| window_of(&config))
    };
    let types = |list: [&str; 3]| json!(list.map(|kind| format!("{kind}_attention")));
    let (slide, full) = (types(["sliding"; 3]), types(["full"; 3]));
    let mixed = types(["full", "sliding", "full"]);
    // As Transformers 5.23 computes each; settings that it cannot compute are refused.
    for (family, keys, expected) in [
        (
            "qwen2",
            json!({"layer_types": slide, "use_sliding_window": true}),
            Some(512),
        ),
        (
            "qwen2",
            json!({"layer_types": mixed, "use_sliding_window": true}),
            Some(512),
        ),
        (
            "qwen2",
            json!({"layer_types": full, "use_sliding_window": true, "max_window_layers": 0}),
            None,
        ),
        (
            "qwen2",
            json!({"layer_types": null, "use_sliding_window": true, "max_window_layers": 1}),
            Some(512),
        ),
        (
            "qwen2",
            json!({"layer_types": full, "use_sliding_window": false}),
            None,
        ),
        ("mistral", json!({"layer_types": full}), None),
        ("mistral", json!({"layer_types": mixed}), Some(512)),
        ("mistral", json!({"layer_types": null}), Some(512)),
        ("llama", json!({"layer_types": slide}), None),
        ("mistral", json!({"sliding_window": 0}), None),
        (
            "qwen2",
            json!({"sliding_window": 0, "use_sliding_window": true, "max_window_layers": 0}),
            None,
        ),
    ] {
        let mut all = json!({"sliding_window": 512});
        all.as_object_mut()
            .unwrap()
            .extend(keys.as_object().unwrap().clone());
        assert_eq!(window(family, all), Ok(expected), "{family} {keys}");
    }
    for (family, keys, word) in [
        ("qwen2", json!({"layer_types": slide}), "use_sliding_window"),
        (
            "mistral",
            json!({"layer_types": slide, "sliding_window": null}),
            "sliding_window",
        ),
        (
            "mistral",
            json!({"layer_types": ["full_attention"]}),
            "layer_types has 1 entries",
        ),
        (
            "qwen2",
            json!({"layer_types": types(["chunked"; 3])}),
            "chunked_attention",
        ),
        (
            "qwen2",
            json!({"layer_types": [1, 2, 3]}),
            "layer_types: [1,2,3]",
        ),
        (
            "qwen2",
            json!({"use_sliding_window": null}),
            "use_sliding_window: null",
        ),
        (
            "qwen2",
            json!({"use_sliding_window": true, "max_window_layers": null}),
            "max_window_layers: null",
        ),
    ] {
        let error = window(family, keys.clone()).unwrap_err();
        assert!(error.contains(word), "{family} {keys}: {error}");
    }
}

#[test]
fn nulls_are_what_they_are_in_transformers() {
    let with = |family: &str, keys: Value| {
        let mut config = llama();
        config["model_type"] = json!(family);
        for (key, value) in keys.as_object().unwrap() {
            config[key] = value.clone();
        }
        ModelConfig::from_json(config).unwrap()
    };
    // If missing, it is the family's default of 32; null means as many as query heads.
    let qwen = json!({"num_attention_heads": 64, "hidden_size": 8192});
    assert_eq!(with("qwen2", qwen).kv_heads, 32);
    let qwen = json!({"num_attention_heads": 64, "hidden_size": 8192, "num_key_value_heads": null});
    assert_eq!(with("qwen2", qwen).kv_heads, 64);
    let nulls = json!({"head_dim": null, "rope_parameters": null, "num_key_value_heads": null,
                       "pretraining_tp": null, "quantization_config": null});
    assert_eq!(with("llama", nulls), with("llama", json!({})));
    // Keys that are not read may have any value.
    let unused = json!({"initializer_range": {"__float__": "NaN"}, "hidden_act": "swish"});
    assert_eq!(with("llama", unused), with("llama", json!({})));
}

proptest! {
    #[test]
    fn any_damage_ends_in_shapes_that_can_be_computed_with_or_a_sentence(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        family in (0..FAMILIES.len()).prop_map(|at| FAMILIES[at].model_type),
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
