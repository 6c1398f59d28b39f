//! Any bytes as a PyTorch file.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| gptq_fuzz::open(&[("pytorch_model.bin", file)]));
