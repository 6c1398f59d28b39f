//! Any bytes as a JSON Lines file of calibration rows.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| gptq_fuzz::calibration_rows("rows.jsonl", file));
