//! Settings of llm-compressor's kinds, what is refused of them, and what is written.

use serde_json::json;

use super::*;
use crate::{CheckpointFormat, QuantizeConfig};

fn parse(settings: Value) -> Result<QuantizeConfig, String> {
    let keys = settings.as_object().unwrap().clone();
    let declared = read(Path::new("config.json"), keys).map_err(|error| error.to_string())?;
    Ok(QuantizeConfig::of_declared(
        declared,
        CheckpointFormat::CompressedTensors,
    ))
}

fn weights(bits: u32, group_size: Option<i64>) -> Value {
    let strategy = if group_size.is_some() {
        "group"
    } else {
        "channel"
    };
    json!({"num_bits": bits, "type": "int", "symmetric": true, "group_size": group_size, "strategy": strategy})
}

fn groups(groups: &[(Value, Value)], ignore: Value) -> Value {
    let groups = groups.iter().enumerate();
    let groups = groups.map(|(i, (targets, weights))| {
        (
            format!("group_{i}"),
            json!({"targets": targets, "weights": weights}),
        )
    });
    let groups: Map<String, Value> = groups.collect();
    json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ignore})
}

#[test]
fn a_name_goes_before_an_expression_and_an_expression_before_the_class() {
    let config = parse(groups(
        &[
            (json!(["Linear"]), weights(4, Some(128))),
            (
                json!(["re:.*down_proj$", "re:.*layers\\.1\\..*"]),
                weights(8, None),
            ),
            (
                json!(["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]),
                weights(3, Some(64)),
            ),
        ],
        json!(["lm_head", "re:.*k_proj", "model.layers.1.self_attn.q_proj"]),
    ))
    .unwrap();
    let module = |name: &str| config.module(name).unwrap();
    let columns = GroupSize::Columns;
    assert_eq!(
        module("model.layers.2.mlp.up_proj"),
        Some((Bits::Four, columns(128)))
    );
    assert_eq!(
        module("model.layers.2.mlp.down_proj"),
        Some((Bits::Eight, GroupSize::Row))
    );
    assert_eq!(
        module("model.layers.0.mlp.down_proj"),
        Some((Bits::Three, columns(64)))
    );
    assert_eq!(
        module("model.layers.1.mlp.up_proj"),
        Some((Bits::Eight, GroupSize::Row))
    );
    assert_eq!(module("model.layers.1.self_attn.k_proj"), None);
    assert_eq!(module("model.layers.1.self_attn.q_proj"), None);
    assert!(module("model.layers.11.self_attn.q_proj").is_some());
}

#[test]
fn without_the_class_only_what_is_named_is_quantized() {
    let config = parse(groups(
        &[(json!(["re:.*mlp.*"]), weights(4, Some(32)))],
        json!(null),
    ))
    .unwrap();
    assert!(
        config
            .module("model.layers.0.mlp.up_proj")
            .unwrap()
            .is_some()
    );
    assert!(
        config
            .module("model.layers.0.self_attn.q_proj")
            .unwrap()
            .is_none()
    );
}

#[test]
fn thousands_of_names_are_read_as_few_expressions() {
    let names: Vec<String> = (0..4096)
        .map(|i| format!("vision.blocks.{i}.attn.q_proj"))
        .collect();
    let config = parse(groups(
        &[(json!(["Linear"]), weights(4, Some(32)))],
        json!(names),
    ))
    .unwrap();
    config.check_patterns().unwrap();
    assert_eq!(
        config.module("vision.blocks.4095.attn.q_proj").unwrap(),
        None
    );
    assert!(
        config
            .module("vision.blocks.4095.attn.q_proj.x")
            .unwrap()
            .is_some()
    );
}

#[test]
fn what_is_more_than_packed_weights_is_named() {
    let plain = groups(&[(json!(["Linear"]), weights(4, Some(32)))], json!([]));
    let with = |pointer: &str, value: Value| {
        let mut settings = plain.clone();
        *settings.pointer_mut(pointer).unwrap() = value;
        parse(settings).unwrap_err()
    };
    let inside = |key: &str, value: Value| {
        let mut settings = plain.clone();
        settings["config_groups"]["group_0"][key] = value;
        parse(settings).unwrap_err()
    };
    let weights = "/config_groups/group_0/weights";
    for (line, words) in [
        (with("/format", json!("marlin-24")), "format \"marlin-24\""),
        (with(weights, json!(null)), "a group without weights"),
        (
            with(&format!("{weights}/num_bits"), json!(6)),
            "weights of 6 bits (int)",
        ),
        (
            with(&format!("{weights}/type"), json!("float")),
            "weights of 4 bits (float)",
        ),
        (
            with(&format!("{weights}/strategy"), json!("block")),
            "the strategy \"block\"",
        ),
        (
            with("/config_groups", json!({})),
            "no group of linear layers",
        ),
        (
            inside("input_activations", json!({"num_bits": 8})),
            "quantized activations",
        ),
        (
            inside("format", json!("int-quantized")),
            "format \"int-quantized\"",
        ),
        (
            inside(
                "weights",
                json!({"num_bits": 4, "group_size": 32, "actorder": "group"}),
            ),
            "act order by group",
        ),
    ] {
        assert!(
            line.contains(&format!("compressed-tensors with {words}")),
            "{line}"
        );
        assert!(!line.contains('\n'), "{line}");
    }
    let mut settings = plain.clone();
    settings["config_groups"]["b"] = json!({"targets": ["re:.*up.*"],
        "weights": {"num_bits": 4, "group_size": 32, "symmetric": false}});
    assert!(
        parse(settings)
            .unwrap_err()
            .contains("symmetric and asymmetric")
    );
}
