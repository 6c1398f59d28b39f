//! Any bytes as the `config.json` of a checkpoint of MLX with one quantized linear layer.
//! After a zero byte, the input goes on with the file of its tensors.
#![no_main]

use std::sync::LazyLock;

use gptq_format::{Checkpoint, Inspection};
use libfuzzer_sys::fuzz_target;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// 64 inputs in two groups, 32 outputs, 4 bits.
static WEIGHTS: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let zeros = vec![0; 32 * 8 * 4];
    let tensor = |name: &str, dtype, shape: Vec<usize>, bytes| {
        let view = TensorView::new(dtype, shape, bytes).expect("it fits");
        (format!("model.layers.0.mlp.down_proj.{name}"), view)
    };
    let tensors = [
        tensor("weight", Dtype::U32, vec![32, 8], &zeros),
        tensor("scales", Dtype::F16, vec![32, 2], &zeros[..128]),
        tensor("biases", Dtype::F16, vec![32, 2], &zeros[..128]),
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
