//! Names are those of the package `gguf` for every family's tensors; what llama.cpp computes otherwise is refused.

use std::path::Path;

use serde_json::{Value, json};

use super::*;

fn golden(path: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(path);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn family(name: &str) -> Value {
    golden(&format!("families/{name}/config.json"))
}

#[test]
fn names_are_those_of_the_package_gguf() {
    let names = golden("gguf/names.json");
    for (name, expected) in names.as_object().unwrap() {
        let mut config = family(name);
        // A head that differs has its own tensor; here the checkpoint's names decide.
        config["tie_word_embeddings"] = (!expected["names"]
            .as_object()
            .unwrap()
            .contains_key("lm_head.weight"))
        .into();
        let config = ModelConfig::from_json(config).unwrap();
        // The fixtures' settings are not those that llama.cpp computes; names do not depend on them.
        let own = GgufModel {
            own: config.llama_cpp.unwrap(),
            config: &config,
        };
        assert_eq!(own.architecture(), expected["architecture"], "{name}");
        let tensors = config.tensors();
        assert_eq!(
            tensors.len(),
            expected["names"].as_object().unwrap().len(),
            "{name}"
        );
        for tensor in tensors {
            let found = own.name(&tensor).unwrap();
            assert_eq!(
                found, expected["names"][&tensor.name],
                "{name}: {}",
                tensor.name
            );
        }
    }
}

#[test]
fn settings_that_llama_cpp_does_not_compute_are_refused() {
    let refuse = |name: &str, key: &str, value: Value| {
        let mut config = family(name);
        config[key] = value;
        let config = ModelConfig::from_json(config).unwrap();
        GgufModel::of(&config).err().unwrap_or_default()
    };
    for (line, words) in [
        (
            refuse("mistral", "sliding_window", json!(24)),
            "sliding windows",
        ),
        (
            refuse("smollm3", "no_rope_layer_interval", json!(3)),
            "rotated blocks",
        ),
        (
            refuse("gemma2", "query_pre_attn_scalar", json!(64)),
            "factor of the scores",
        ),
        (
            refuse("cohere2", "vocab_size", json!(512)),
            "this family are not written",
        ),
    ] {
        assert!(line.contains(words), "{words:?} is not in {line:?}");
        assert!(!line.contains('\n'), "{line}");
    }
}

#[test]
fn frequencies_of_llama_3_have_divisors() {
    let config = ModelConfig::from_json(family("llama3")).unwrap();
    let own = GgufModel::of(&config).unwrap();
    let divisors = own.divisors();
    let [(name, values)] = &divisors[..] else {
        panic!("{divisors:?}")
    };
    assert_eq!(
        (*name, values.len()),
        ("rope_freqs.weight", config.rope.dim / 2)
    );
    let plain = RopeScaling::Default.frequencies(config.rope.theta, config.rope.dim, 1);
    let scaled = config
        .rope
        .scaling
        .frequencies(config.rope.theta, config.rope.dim, 1);
    for ((plain, scaled), divisor) in plain.iter().zip(scaled).zip(values) {
        assert!((plain / scaled / divisor - 1.0).abs() < 1e-5);
    }
}
