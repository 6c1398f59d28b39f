//! Settings of AutoGPTQ and GPTQModel, what others' are called, and which modules they quantize.

use super::*;
use crate::dynamic_rules::{MAX_PATTERN, MAX_PATTERNS};

#[test]
fn configs_of_other_tools_parse_with_their_extra_keys() {
    let config: QuantizeConfig = serde_json::from_str(
        r#"{"bits": 4, "group_size": 128, "desc_act": true, "lm_head": false, "method": "gptq",
                "quant_method": "gptq", "checkpoint_format": "gptq", "meta": {"damp_percent": 0.1}, "sym": true}"#,
    )
    .unwrap();
    assert_eq!(config.bits, Bits::Four);
    assert_eq!(config.group_size, GroupSize::Columns(128));
    assert!(config.desc_act && config.sym);
}

#[test]
fn the_older_name_of_the_format_counts_where_the_newer_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    for (text, expected) in [
        (
            r#"{"bits": 4, "group_size": 64, "format": "gptq_v2"}"#,
            CheckpointFormat::GptqV2,
        ),
        (
            r#"{"bits": 4, "group_size": 64, "format": "gptq_v2", "checkpoint_format": "gptq"}"#,
            CheckpointFormat::Gptq,
        ),
    ] {
        std::fs::write(dir.path().join("quantize_config.json"), text).unwrap();
        let config = QuantizeConfig::read(dir.path()).unwrap().unwrap();
        assert_eq!(config.checkpoint_format, expected);
    }
}

#[test]
fn settings_that_say_nothing_are_none_and_those_of_others_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let read = |settings: &str| {
        let config = format!(r#"{{"quantization_config": {settings}}}"#);
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        QuantizeConfig::read(dir.path()).map_err(|error| error.to_string())
    };
    for nothing in ["null", "{}", r#"{"quant_method": null}"#] {
        assert_eq!(read(nothing), Ok(None), "{nothing}");
    }
    for (settings, method) in [
        (
            r#"{"quant_method": "bitsandbytes", "load_in_4bit": true}"#,
            "bitsandbytes",
        ),
        (r#"{"load_in_8bit": true}"#, "bitsandbytes"),
        (r#"{"quant_method": "fp8"}"#, "fp8"),
        (r#"{"quant_method": "awq", "bits": 4}"#, "awq"),
        (r#"{"version": "gemm"}"#, "AWQ"),
        (
            r#"{"quant_method": "compressed-tensors", "format": "float-quantized"}"#,
            "compressed-tensors with format \"float-quantized\"",
        ),
        (r#"{"modules": []}"#, "does not name"),
        (r#""gptq""#, "not an object"),
    ] {
        let line = read(settings).unwrap_err();
        assert!(
            line.contains(method) && line.contains("config.json: "),
            "{line}"
        );
    }
    let nulls =
        r#"{"bits": 4, "group_size": 64, "sym": null, "dynamic": null, "damp_percent": null}"#;
    let config = read(nulls).unwrap().unwrap();
    assert!(config.sym && config.dynamic.is_none());
}

#[test]
fn only_the_modules_that_are_listed_are_quantized() {
    let module = |lists: &str, name: &str| {
        let config: QuantizeConfig = serde_json::from_str(&format!(
            r#"{{"bits": 4, "group_size": 64, "modules_in_block_to_quantize": {lists}}}"#
        ))
        .unwrap();
        config.module(name).unwrap().is_some()
    };
    for lists in [
        r#"[["self_attn.q_proj", "self_attn.v_proj"], ["mlp.up_proj"]]"#,
        r#"["self_attn.q_proj", "mlp.up_proj"]"#,
    ] {
        assert!(module(lists, "model.layers.0.self_attn.q_proj"));
        assert!(!module(lists, "model.layers.0.self_attn.k_proj"));
    }
    assert!(module("[]", "model.layers.0.self_attn.k_proj"));
}

#[test]
fn dynamic_is_tried_in_the_order_in_which_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let rules = [
        r#""-:.*layers\\.0\\..*": {}"#,
        r#""+:.*down_proj.*": {"bits": 8}"#,
    ];
    let module = |first: usize, name: &str| {
        let dynamic = format!("{}, {}", rules[first], rules[1 - first]);
        let settings = format!(r#"{{"bits": 4, "group_size": 64, "dynamic": {{{dynamic}}}}}"#);
        let inside = format!(r#"{{"quantization_config": {settings}}}"#);
        std::fs::write(dir.path().join("quantize_config.json"), settings).unwrap();
        std::fs::write(dir.path().join("config.json"), inside).unwrap();
        let both = [
            QuantizeConfig::own(dir.path()),
            QuantizeConfig::inside(dir.path()),
        ];
        let both = both.map(|it| it.unwrap().unwrap().module(name).unwrap());
        assert_eq!(both[0], both[1]);
        both[0].map(|(bits, _)| bits)
    };
    // As GPTQModel's `dynamic_get` has it.
    assert_eq!(module(0, "model.layers.0.mlp.down_proj"), None);
    assert_eq!(module(1, "model.layers.0.mlp.down_proj"), Some(Bits::Eight));
    assert_eq!(module(0, "model.layers.1.mlp.down_proj"), Some(Bits::Eight));
    assert_eq!(module(1, "model.layers.0.mlp.up_proj"), None);
}

#[test]
fn patterns_over_a_limit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let read = |patterns: Vec<String>| {
        let dynamic: Map<_, _> = (patterns.into_iter())
            .map(|pattern| (pattern, serde_json::json!({})))
            .collect();
        let config = serde_json::json!({"bits": 4, "group_size": 64, "dynamic": dynamic});
        std::fs::write(dir.path().join("quantize_config.json"), config.to_string()).unwrap();
        QuantizeConfig::read(dir.path()).map(|config| config.unwrap())
    };
    let many = |n: usize| (0..n).map(|i| format!("-:{i}")).collect();
    assert!(read(many(MAX_PATTERNS)).is_ok());
    assert!(read(many(MAX_PATTERNS + 1)).is_err());
    assert!(read(vec!["x".repeat(MAX_PATTERN + 1)]).is_err());
    let error = read(vec!["((a{100}){100}){100}".into()]).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("over 1048576 bytes as compiled"), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

#[test]
fn dynamic_patterns_override_or_skip_modules() {
    let config: QuantizeConfig = serde_json::from_str(
        r#"{"bits": 4, "group_size": 128, "dynamic": {
                "+:.*\\.down_proj$": {"bits": 8, "group_size": 32}, "-:.*\\.k_proj$": {}}}"#,
    )
    .unwrap();
    let module = |name| config.module(name).unwrap();
    assert_eq!(
        module("model.layers.0.mlp.down_proj"),
        Some((Bits::Eight, GroupSize::Columns(32)))
    );
    assert_eq!(module("model.layers.0.self_attn.k_proj"), None);
    assert_eq!(
        module("model.layers.0.self_attn.q_proj"),
        Some((Bits::Four, GroupSize::Columns(128)))
    );
}
