//! Any bytes as a safetensors file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| gptq_fuzz::open(&[("model.safetensors", file)]));
