//! Any bytes as the `config.json` of a checkpoint of compressed-tensors with one quantized linear layer.
//! After a zero byte, the input goes on with the file of its tensors.
#![no_main]

use std::sync::LazyLock;

use gptq_format::{Checkpoint, Inspection};
use libfuzzer_sys::fuzz_target;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// 64 inputs in two groups, 32 outputs, 4 bits, asymmetric.
static WEIGHTS: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let shape_bytes = [32i64, 64].map(i64::to_le_bytes).concat();
    let zeros = vec![0; 32 * 8 * 4];
    let tensor = |name: &str, dtype, shape: Vec<usize>, bytes| {
        let view = TensorView::new(dtype, shape, bytes).expect("it fits");
        (format!("model.layers.0.mlp.down_proj.{name}"), view)
    };
    let tensors = [
        tensor("weight_packed", Dtype::I32, vec![32, 8], &zeros),
        tensor("weight_scale", Dtype::F16, vec![32, 2], &zeros[..128]),
        tensor("weight_shape", Dtype::I64, vec![2], &shape_bytes),
        tensor("weight_zero_point", Dtype::I32, vec![4, 2], &zeros[..32]),
    ];
    safetensors::serialize(tensors, None).expect("they are valid")
});

fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(2, |&byte| byte == 0);
    let config = parts.next().unwrap_or_default();
    let files = [
        ("model.safetensors", parts.next().unwrap_or(&WEIGHTS)),
        ("config.json", config),
    ];
    gptq_fuzz::with_files(&files, |dir| {
        if let Ok(checkpoint) = Checkpoint::open(dir) {
            let _ = checkpoint.packed("model.layers.0.mlp.down_proj", 64, 32);
            let _ = Inspection::of(dir);
        }
    });
});
