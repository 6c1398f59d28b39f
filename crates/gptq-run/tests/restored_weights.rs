//! The basis of resuming: packed tensors give back, bit for bit, the weights that the solver used
//! for the forward pass.

use std::path::Path;

use burn::tensor::{DType, Tensor, TensorData};
use gptq_kernels::{Cpu, Engine, HessianOptions, Problem, Request};
use gptq_plan::{Plan, Recipe};
use gptq_spec::ModelConfig;
use serde_json::json;

/// Returns deterministic values uniform in ±1.
fn noise(rows: usize, cols: usize, seed: u64) -> Tensor<Cpu, 2> {
    let mut state = seed;
    let one = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    let values: Vec<f32> = (0..rows * cols).map(one).collect();
    let data = TensorData::new(values, [rows, cols]);
    Tensor::from_data(data, (&Default::default(), DType::F32))
}

fn bits(weight: Tensor<Cpu, 2>) -> Vec<u32> {
    let values = weight.into_data().into_vec::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

#[test]
fn packed_tensors_give_back_the_solved_weights_bit_for_bit() {
    let config = ModelConfig::from_json(json!({
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
    }))
    .unwrap();
    let mut text = "[model]\nsource = \"m\"\n[calibration]\nsource = \"c.json\"\nseq_len = 64\n\
                    [output]\ndir = \"out\"\n"
        .to_owned();
    for width in [2, 3, 4, 8] {
        for (i, rest) in [
            "group_size = -1",
            "group_size = 32\nsym = false",
            "group_size = 32\nstatic_groups = true",
            "group_size = 64\ndesc_act = false\npreset = \"autogptq\"",
        ]
        .iter()
        .enumerate()
        {
            text += &format!("[[branch]]\nname = \"b{width}-{i}\"\nbits = {width}\n{rest}\n");
        }
    }
    let recipe = Recipe::parse(Path::new("r.toml"), text).unwrap();
    let plan = Plan::for_config(&recipe, config).unwrap();
    assert_eq!(plan.branches.len(), 16);
    for branch in &plan.branches {
        let x = noise(512, 128, 1);
        let gram = Cpu::gram_add(Cpu::gram_zeros([128, 128], &Default::default()), x);
        let hessian = HessianOptions {
            act_order: branch.desc_act,
            damping: branch.damp_percent,
        };
        let request = Request {
            // Some weights of a f16 checkpoint are tiny.
            weight: noise(128, 128, 2) * noise(128, 128, 3).powi_scalar(9),
            settings: branch.module("model.layers.0.self_attn.q_proj").unwrap(),
            residual: None,
            keep_unrounded: false,
        };
        let problem = Problem {
            gram,
            mismatch: None,
            requests: vec![request],
        };
        let solved = Cpu::solve(problem, hessian).unwrap();
        let solved = solved.solved.into_iter().next().unwrap();
        let again = Cpu::dequantize_packed(
            &Cpu::pack(solved.codes).wait(),
            DType::F32,
            &Default::default(),
        );
        assert!(bits(again) == bits(solved.weight), "{}", branch.name);
    }
}
