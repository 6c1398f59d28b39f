//! Any bytes as `quantize_config.json` beside the tensors of one quantized linear layer.
#![no_main]

use std::sync::LazyLock;

use gptq_format::{Inspection, QuantizeConfig};
use libfuzzer_sys::fuzz_target;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// 64 inputs in two groups, 32 outputs, 4 bits.
static WEIGHTS: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let zeros = vec![0; 8 * 32 * 4];
    let tensor = |name: &str, dtype, shape: [usize; 2], bytes: usize| {
        let shape = shape.into_iter().filter(|&n| n > 0).collect();
        let view = TensorView::new(dtype, shape, &zeros[..bytes]).expect("it fits");
        (format!("model.layers.0.mlp.down_proj.{name}"), view)
    };
    let tensors = [
        tensor("qweight", Dtype::I32, [8, 32], 1024),
        tensor("qzeros", Dtype::I32, [2, 4], 32),
        tensor("scales", Dtype::F16, [2, 32], 128),
        tensor("g_idx", Dtype::I32, [64, 0], 256),
    ];
    safetensors::serialize(tensors, None).expect("they are valid")
});

fuzz_target!(|bytes: &[u8]| {
    let files = [
        ("model.safetensors", WEIGHTS.as_slice()),
        ("quantize_config.json", bytes),
    ];
    gptq_fuzz::with_files(&files, |dir| {
        if let Ok(Some(settings)) = QuantizeConfig::read(dir) {
            let _ = settings.module("model.layers.0.self_attn.q_proj");
            let _ = Inspection::of(dir);
        }
    });
});
