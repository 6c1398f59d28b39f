//! Checkpoints that match their config, and changed ones.

use gptq_format::{ShardedWriter, TensorSpec, write_json};
use serde_json::{Value, json};

use super::*;

fn config(model_type: &str, tied: bool) -> Value {
    json!({
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 100, "tie_word_embeddings": tied,
    })
}

/// Takes the census of tensors of ones that match the config, except for `change`.
fn census(config: &Value, change: impl FnOnce(&mut Vec<TensorSpec>)) -> Census {
    let dir = tempfile::tempdir().unwrap();
    write_json(&dir.path().join("config.json"), config).unwrap();
    let all = ModelConfig::from_json(config.clone()).unwrap().tensors();
    let spec = |it: ModelTensor| TensorSpec {
        name: it.name,
        dtype: Dtype::F16,
        shape: it.shape,
    };
    let mut specs: Vec<TensorSpec> = all.into_iter().map(spec).collect();
    change(&mut specs);
    let writer = ShardedWriter::create(dir.path(), &specs, None).unwrap();
    for spec in &specs {
        writer.write(&spec.name, &vec![0x3c; spec.bytes()]).unwrap();
    }
    writer.finish().unwrap();
    Census::take(dir.path()).unwrap()
}

fn fault(census: Census) -> String {
    census.fault.map_or_else(String::new, |it| it.to_string())
}

#[test]
fn whatever_the_config_asks_for_is_missed_by_name() {
    for (model_type, tied) in [("llama", false), ("llama", true), ("qwen2", false)] {
        let config = config(model_type, tied);
        let whole = census(&config, |_| {});
        assert!(whole.warnings.is_empty());
        let all = whole.config.tensors();
        assert_eq!(fault(whole), "");
        for (at, tensor) in all.iter().enumerate() {
            let name = &tensor.name;
            let gone = fault(census(&config, |specs| drop(specs.remove(at))));
            assert!(
                gone.contains(&format!("tensor {name} is missing")),
                "{name}: {gone}"
            );
            let other = fault(census(&config, |specs| specs[at].shape.push(1)));
            assert!(
                other.contains(&format!("tensor {name} has shape")),
                "{name}: {other}"
            );
            let typed = fault(census(&config, |specs| specs[at].dtype = Dtype::I16));
            assert!(
                typed.contains(&format!("tensor {name} has dtype I16")),
                "{name}: {typed}"
            );
        }
    }
}

#[test]
fn a_tied_flag_gives_way_to_a_head_that_differs_and_an_equal_one_to_the_flag() {
    let with_head = |shape: [usize; 2]| {
        census(&config("llama", true), |specs| {
            specs.push(TensorSpec {
                name: "lm_head.weight".into(),
                dtype: Dtype::F16,
                shape: shape.into(),
            });
        })
    };
    let equal = with_head([100, 64]);
    assert!(equal.config.tied_embeddings && equal.warnings.is_empty());
    assert_eq!(fault(equal), "");
    let other = with_head([50, 128]);
    assert!(!other.config.tied_embeddings);
    assert!(fault(other).contains("lm_head.weight has shape [50, 128]"));
}

#[test]
fn what_is_not_asked_for_is_refused_where_the_model_has_a_place_for_it() {
    let with = |name: &str| {
        let census = census(&config("llama", false), |specs| {
            specs.push(TensorSpec {
                name: name.into(),
                dtype: Dtype::F16,
                shape: vec![1],
            });
        });
        let warnings = census.warnings.join("; ");
        (fault(census), warnings)
    };
    for name in [
        "model.layers.0.self_attn.k_norm.weight",
        "model.layers.1.post_feedforward_layernorm.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embed_positions.weight",
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.0.mlp.up_proj.lora_B.default.weight",
    ] {
        assert!(with(name).0.contains(name), "{name}: {:?}", with(name));
    }
    for name in [
        "score.weight",
        "vision_tower.x",
        "model.layers.0.self_attn.k_scale",
    ] {
        let (fault, warning) = with(name);
        assert_eq!(fault, "", "{name}");
        assert!(
            warning.contains(&format!("tensor {name} is not part")),
            "{warning}"
        );
    }
    for name in [
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
    ] {
        assert_eq!(with(name), (String::new(), String::new()), "{name}");
    }
}

/// The config of a model with 4 experts, and the names of the tensors of one block's.
fn mixture() -> Value {
    let mut config = config("qwen3_moe", false);
    config["num_experts"] = json!(4);
    config["num_experts_per_tok"] = json!(2);
    config["moe_intermediate_size"] = json!(32);
    config
}

/// Replaces the experts of block 1 by tensors with all of them.
fn stack(specs: &mut Vec<TensorSpec>, shapes: [[usize; 3]; 2]) {
    let experts = "model.layers.1.mlp.experts.";
    specs.retain(|spec| !spec.name.starts_with(experts));
    for (kind, shape) in ["gate_up_proj", "down_proj"].into_iter().zip(shapes) {
        specs.push(TensorSpec {
            name: format!("{experts}{kind}"),
            dtype: Dtype::F16,
            shape: shape.into(),
        });
    }
}

#[test]
fn stacked_experts_are_taken_apart() {
    let whole = census(&mixture(), |specs| stack(specs, [[4, 64, 64], [4, 64, 32]]));
    assert!(whole.warnings.is_empty(), "{:?}", whole.warnings);
    let checkpoint = &whole.checkpoint;
    for (name, shape) in [
        ("3.gate_proj", [32, 64]),
        ("0.up_proj", [32, 64]),
        ("2.down_proj", [64, 32]),
    ] {
        let name = format!("model.layers.1.mlp.experts.{name}.weight");
        assert_eq!(checkpoint.view(&name).unwrap().shape, shape, "{name}");
    }
    assert!(!checkpoint.contains("model.layers.1.mlp.experts.down_proj"));
    assert_eq!(fault(whole), "");
}

#[test]
fn experts_that_are_missing_or_stacked_in_another_shape_are_refused_by_name() {
    let other = census(&mixture(), |specs| stack(specs, [[4, 64, 64], [4, 32, 64]]));
    let line = fault(other);
    let words = "mlp.experts.down_proj has shape [4, 32, 64], expected [4, 64, 32]";
    assert!(line.contains(words), "{line}");
    let gone = census(&mixture(), |specs| {
        specs.retain(|spec| !spec.name.contains("layers.0.mlp.experts.3."));
    });
    let line = fault(gone);
    let words = "model.layers.0.mlp.experts.3.gate_proj.weight is missing and 2 more are";
    assert!(line.contains(words), "{line}");
    let gone = census(&mixture(), |specs| {
        specs.retain(|spec| !spec.name.contains("mlp.gate."))
    });
    let line = fault(gone);
    assert!(
        line.contains("model.layers.0.mlp.gate.weight is missing"),
        "{line}"
    );
}
