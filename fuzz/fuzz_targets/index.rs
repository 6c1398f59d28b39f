//! Any bytes as the index of a sharded checkpoint, beside one shard.
#![no_main]

use libfuzzer_sys::fuzz_target;

/// One f16 tensor, `x`, of 2 elements.
const HEADER: &[u8] = br#"{"x":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#;

fuzz_target!(|index: &[u8]| {
    let length = (HEADER.len() as u64).to_le_bytes();
    let shard = [&length, HEADER, &[0; 4]].concat();
    gptq_fuzz::open(&[
        ("model.safetensors.index.json", index),
        ("a.safetensors", &shard),
    ]);
});
