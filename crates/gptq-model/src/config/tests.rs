//! Configs as they are found, and what is refused of them.

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
        (
            "attention_bias",
            json!(1),
            "attention_bias = 1 is neither true nor false",
        ),
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
        let linears = config.block(0).linears().iter();
        let found: Vec<bool> = linears.map(|linear| linear.bias).collect();
        assert_eq!(found, [qkv, qkv, qkv, o, mlp, mlp, mlp], "{family}");
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
