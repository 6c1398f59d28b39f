//! Tests of the values that are computed from a description.

use crate::{BlockSpec, Division, ModelConfig};

/// A Llama block with fewer key heads than query heads, which together are wider than the hidden states.
fn llama() -> BlockSpec {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100,
        "mlp_bias": true,
    });
    let config = ModelConfig::from_json(config).unwrap();
    assert_eq!(config.blocks().len(), 2);
    (**config.block(1)).clone()
}

#[test]
fn a_llama_block_has_four_taps() {
    let block = llama();
    let named = |tap| {
        let linears = block.linears_of(tap);
        let names = linears.map(|at| {
            assert_eq!(block.linears()[at].tap, tap);
            (
                block.linears()[at].name.as_str(),
                block.linears()[at].shape(),
            )
        });
        (
            block.tap_name(tap),
            block.in_features(tap),
            names.collect::<Vec<_>>(),
        )
    };
    let expected = [
        (
            "qkv",
            64,
            vec![
                ("self_attn.q_proj", (64, 128)),
                ("self_attn.k_proj", (64, 64)),
                ("self_attn.v_proj", (64, 64)),
            ],
        ),
        ("o", 128, vec![("self_attn.o_proj", (128, 64))]),
        (
            "gate_up",
            64,
            vec![("mlp.gate_proj", (64, 160)), ("mlp.up_proj", (64, 160))],
        ),
        ("down", 160, vec![("mlp.down_proj", (160, 64))]),
    ];
    assert_eq!(block.taps().map(named).collect::<Vec<_>>(), expected);
    let module = block.linears()[6].module(3);
    assert_eq!(module, "model.layers.3.mlp.down_proj");
    let norms: Vec<_> = block
        .vectors()
        .iter()
        .map(|it| (&*it.name, it.len))
        .collect();
    assert_eq!(
        norms,
        [("input_layernorm", 64), ("post_attention_layernorm", 64)]
    );
    // Weights, three biases in the feed-forward, two norms.
    let weights = 64 * (128 + 64 + 64) + 128 * 64 + 3 * 64 * 160;
    assert_eq!(block.weights(), weights);
    assert_eq!(block.parameters(), weights + 160 + 160 + 64 + 64 + 64);
}

#[test]
fn only_what_is_read_after_a_cut_is_kept() {
    let block = llama();
    // The residual stream, and after attention and the gate what comes of them.
    let kept: Vec<usize> = block.taps().map(|tap| block.kept_features(tap)).collect();
    assert_eq!(kept, [0, 128, 0, 160]);
    let as_kept: Vec<bool> = block
        .taps()
        .map(|tap| block.kept_input(tap).is_some())
        .collect();
    assert_eq!(as_kept, [false, true, false, true]);
    let adds: Vec<bool> = block.taps().map(|tap| block.adds(tap..tap + 1)).collect();
    assert_eq!(adds, [false, true, false, true]);
    assert!(block.adds(0..2) && block.adds(2..4) && !block.adds(0..1));
}

#[test]
fn linears_are_fused_only_together() {
    let block = llama();
    assert_eq!(block.fused(&[0, 1, 2]), ["self_attn.qkv_proj"]);
    assert_eq!(block.fused(&[0, 2]), [""; 0]);
    assert_eq!(block.fused(&[3, 4, 5]), ["mlp.gate_up_proj"]);
    assert_eq!(block.fused(&[3]), [""; 0]);
}

#[test]
fn devices_divide_what_they_compute_themselves_by_inputs() {
    let block = llama();
    let divisions: Vec<Division> = (0..7).map(|linear| block.division(linear)).collect();
    use Division::{Inputs, KvHeads, Outputs};
    let expected = [Outputs, KvHeads, KvHeads, Inputs, Outputs, Outputs, Inputs];
    assert_eq!(divisions, expected);
}

/// A block of a family, its config otherwise as [`llama`]'s.
fn block_of(model_type: &str) -> BlockSpec {
    let config = serde_json::json!({
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 100,
        "residual_multiplier": 0.22,
    });
    (**ModelConfig::from_json(config).unwrap().block(0)).clone()
}

#[test]
fn fused_linears_are_taps_under_their_own_names() {
    let block = block_of("phi3");
    let names: Vec<&str> = block.taps().map(|tap| block.tap_name(tap)).collect();
    assert_eq!(names, ["qkv", "o", "gate_up", "down"]);
    let linears = block.linears().iter();
    let linears: Vec<_> = linears.map(|it| (it.name.as_str(), it.shape())).collect();
    let expected = [
        ("self_attn.qkv_proj", (64, 256)),
        ("self_attn.o_proj", (128, 64)),
        ("mlp.gate_up_proj", (64, 320)),
        ("mlp.down_proj", (160, 64)),
    ];
    assert_eq!(linears, expected);
    use Division::{Inputs, KvHeads, Outputs};
    let divisions: Vec<Division> = (0..4).map(|linear| block.division(linear)).collect();
    assert_eq!(divisions, [KvHeads, Inputs, Outputs, Inputs]);
}

#[test]
fn outputs_that_go_straight_to_the_residual_stream_are_known() {
    for (family, o, down) in [
        ("llama", Some(1.0), Some(1.0)),
        ("granite", Some(0.22), Some(0.22)),
        ("cohere2", Some(1.0), Some(1.0)),
        // Norms stand between.
        ("olmo2", None, None),
        ("gemma2", None, None),
    ] {
        let block = block_of(family);
        let found: Vec<_> = (0..7).map(|linear| block.added(linear)).collect();
        let expected = [None, None, None, o, None, None, down];
        assert_eq!(found, expected, "{family}");
    }
}

#[test]
fn what_two_taps_take_is_kept_between_them() {
    // Attention and feed-forward from one norm; and none at all before either.
    for (family, kept) in [
        ("cohere2", [0, 64 + 128, 64, 160]),
        ("olmo2", [0, 128, 0, 160]),
    ] {
        let block = block_of(family);
        let found: Vec<usize> = block.taps().map(|tap| block.kept_features(tap)).collect();
        assert_eq!(found, kept, "{family}");
        use Division::{Inputs, KvHeads, Outputs};
        let divisions: Vec<Division> = (0..7).map(|linear| block.division(linear)).collect();
        let expected = [Outputs, KvHeads, KvHeads, Inputs, Outputs, Outputs, Inputs];
        assert_eq!(divisions, expected, "{family}");
    }
}

/// A block of 4 experts, 2 a token, 32 wide.
fn mixture(model_type: &str) -> BlockSpec {
    let config = serde_json::json!({
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 100, "num_experts_per_tok": 2,
        "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96, "qkv_bias": false,
    });
    (**ModelConfig::from_json(config).unwrap().block(1)).clone()
}

#[test]
fn experts_are_two_taps_with_an_input_for_each() {
    for (family, path, [gate, up, down]) in [
        ("qwen3_moe", "mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("mixtral", "block_sparse_moe", ["w1", "w3", "w2"]),
        ("olmoe", "mlp", ["gate_proj", "up_proj", "down_proj"]),
    ] {
        let block = mixture(family);
        let names: Vec<&str> = block.taps().map(|tap| block.tap_name(tap)).collect();
        assert_eq!(
            names,
            ["qkv", "o", "experts.gate_up", "experts.down"],
            "{family}"
        );
        let inputs: Vec<usize> = block.taps().map(|tap| block.inputs(tap)).collect();
        assert_eq!(inputs, [1, 1, 4, 4], "{family}");
        assert_eq!(
            [2, 3].map(|tap| block.in_features(tap)),
            [64, 32],
            "{family}"
        );
        assert_eq!(block.settings_groups(), [0..1, 1..2, 2..4], "{family}");
        let named = |tap, expert| {
            let linears = block.linears_at(tap, expert);
            linears
                .map(|at| block.linears()[at].name.clone())
                .collect::<Vec<_>>()
        };
        let name = |expert: usize, part: &str| format!("{path}.experts.{expert}.{part}");
        assert_eq!(named(2, 1), [name(1, gate), name(1, up)]);
        assert_eq!(named(3, 2), [name(2, down)]);
        // Two slots of 32, and the choice: 2 x 2 numbers of 32 bits. What experts are given is computed again.
        assert_eq!(block.kept_features(3), 2 * 32 + 8, "{family}");
        let last = block.linears().len() - 1;
        assert_eq!(
            (block.added(last), block.added(4)),
            (Some(1.0), None),
            "{family}"
        );
        assert_eq!(block.division(4), Division::Outputs, "{family}");
        assert_eq!(block.division(last), Division::Inputs, "{family}");
        let all: Vec<usize> = (4..=last).collect();
        assert_eq!(block.fused(&all), [format!("{path}.experts")], "{family}");
        assert_eq!(
            block.matrices()[0].weight(1),
            format!("model.layers.1.{path}.gate.weight")
        );
    }
}

#[test]
fn a_shared_expert_makes_up_for_the_residual_stream_first_and_its_input_is_kept() {
    let block = mixture("qwen2_moe");
    let names: Vec<&str> = block.taps().map(|tap| block.tap_name(tap)).collect();
    let shared = ["gate_up", "down"];
    let experts = ["experts.gate_up", "experts.down"];
    assert_eq!(names[2..], [shared, experts].concat());
    assert_eq!(block.linears()[4].shape(), (64, 96));
    // Its output is weighed before it is added.
    assert_eq!(block.added(6), None);
    let kept: Vec<usize> = block.taps().map(|tap| block.kept_features(tap)).collect();
    assert_eq!(kept[3..], [96 + 64, 64, 64 + 2 * 32 + 8]);
    assert_eq!(block.matrices()[0].shape, [1, 64]);
}
