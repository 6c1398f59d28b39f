//! Any bytes as an Arrow file of calibration rows, in the stream or the file format.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| gptq_fuzz::calibration_rows("rows.arrow", file));
