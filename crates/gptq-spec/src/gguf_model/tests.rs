//! Names are those of the package `gguf` for every family's tensors; what llama.cpp computes otherwise is refused.

use std::path::Path;

use gptq_format::Half;
use serde_json::{Value, json};

use super::*;

fn golden_file(path: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(path);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn family(name: &str) -> Value {
    golden_file(&format!("families/{name}/config.json"))
}

#[test]
fn names_are_those_of_the_package_gguf() {
    let names = golden_file("gguf/names.json");
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
            // Blocks that the architecture lacks, which are refused.
            if expected["names"][&tensor.name].is_null() {
                assert_eq!(name, "qwen2_moe");
                continue;
            }
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
            refuse("phi3-window", "vocab_size", json!(512)),
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
        (
            refuse("mixtral", "sliding_window", json!(24)),
            "sliding windows",
        ),
        (
            refuse("qwen3_moe", "mlp_only_layers", json!([0])),
            "blocks without experts",
        ),
        (
            refuse("qwen3_moe", "norm_topk_prob", json!(false)),
            "renormalization of experts' weights",
        ),
        (
            refuse("olmoe", "vocab_size", json!(512)),
            "fewer key-value heads than heads",
        ),
        (
            refuse("qwen2_moe", "vocab_size", json!(512)),
            "blocks without experts",
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

#[test]
fn experts_are_counted_and_their_widths_told_where_llama_cpp_asks() {
    let keys = |name: &str, edits: &[(&str, Value)]| {
        let mut config = family(name);
        for (key, value) in edits {
            config[*key] = value.clone();
        }
        let config = ModelConfig::from_json(config).unwrap();
        let own = GgufModel::of(&config).unwrap();
        let keys = own.keys().into_iter();
        let found: Vec<(String, GgufValue)> =
            keys.filter(|(key, _)| key.contains("expert_")).collect();
        (found, own.repeats_embedding())
    };
    let of = |arch: &str, all: &[(&str, u32)]| -> Vec<(String, GgufValue)> {
        let all = all.iter();
        all.map(|(key, n)| (format!("{arch}.expert_{key}"), GgufValue::U32(*n)))
            .collect()
    };
    let counts = [("count", 8), ("used_count", 2)];
    assert_eq!(keys("mixtral", &[]), (of("llama", &counts), false));
    let width = [counts[0], counts[1], ("feed_forward_length", 64)];
    assert_eq!(keys("qwen3_moe", &[]), (of("qwen3moe", &width), false));
    let shared = [
        width[0],
        width[1],
        width[2],
        ("shared_feed_forward_length", 64),
    ];
    let all_sparse = keys("qwen2_moe", &[("mlp_only_layers", json!([]))]);
    assert_eq!(all_sparse, (of("qwen2moe", &shared), true));
    let untied = [
        ("num_key_value_heads", json!(4)),
        ("tie_word_embeddings", json!(false)),
    ];
    assert_eq!(keys("olmoe", &untied), (of("olmoe", &counts), false));
}

/// A number of the converter's, which is an f32 or smaller.
fn same(found: &GgufValue, expected: &Value) -> bool {
    match found {
        GgufValue::U32(n) => expected == &json!(n),
        GgufValue::F32(x) => expected.as_f64().is_some_and(|it| it as f32 == *x),
        GgufValue::Text(text) => expected == text,
        _ => false,
    }
}

#[test]
fn keys_and_tensors_are_those_of_the_converter_of_llama_cpp() {
    for (name, golden) in golden_file("gguf/converted.json").as_object().unwrap() {
        let config = match name.as_str() {
            "medi-tiny" => golden_file("../models/medi-tiny/config.json"),
            family => self::family(family),
        };
        let config = ModelConfig::from_json(config).unwrap();
        // The fixtures' settings are not those that llama.cpp computes; keys and names do not depend on them.
        let own = GgufModel {
            own: config.llama_cpp.unwrap(),
            config: &config,
        };
        assert_eq!(own.architecture(), golden["architecture"], "{name}");
        let keys: std::collections::BTreeMap<String, GgufValue> = own.keys().into_iter().collect();
        let expected = golden["metadata"].as_object().unwrap().iter();
        for (key, value) in expected.filter(|(key, _)| !key.starts_with("tokenizer.")) {
            let found = keys.get(key);
            assert!(
                found.is_some_and(|it| same(it, value)),
                "{name}: {key} is {value}, here {found:?}"
            );
        }
        // Those that llama.cpp would compute itself.
        let known = ["vocab_size", "rope.dimension_count", "attention.key_length"];
        let known = [&known[..], &["attention.value_length"]].concat();
        for key in keys
            .keys()
            .filter(|key| golden["metadata"].get(key).is_none())
        {
            let (_, key) = key.split_once('.').unwrap();
            assert!(known.contains(&key), "{name}: {key} is ours alone");
        }
        let layout = crate::GgufLayout::of(&own, Half::F16, crate::TableType::Half, |_| None);
        let tensors = layout.unwrap().tensors.into_iter();
        let tensors = tensors.map(|it| (it.name, json!([it.kind.name(), it.shape])));
        let mut tensors: serde_json::Map<String, Value> = tensors.collect();
        for (name, values) in own.divisors() {
            tensors.insert(name.to_owned(), json!(["F32", [values.len()]]));
        }
        if own.repeats_embedding() {
            assert!(tensors.remove("output.weight").is_some());
        }
        assert_eq!(Value::Object(tensors), golden["tensors"], "{name}");
    }
}
