//! Any bytes as a GGUF file.
#![no_main]

use gptq_format::{GgufFile, GgufRows, Inspection, decode_blocks};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    gptq_fuzz::with_files(&[("m.gguf", bytes)], |dir| {
        let path = dir.join("m.gguf");
        if let Ok(file) = GgufFile::open(&path) {
            for tensor in file.tensors() {
                if let (Ok((_, bytes)), &[n_out, n_in]) = (file.tensor(&tensor.name), &*tensor.shape) {
                    let _ = decode_blocks(bytes, tensor.kind, GgufRows::Paired(2), [n_out, n_in], "x");
                }
            }
            let _ = Inspection::of(&path);
        }
    });
});
