//! Any bytes as a Parquet file of calibration rows.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|file: &[u8]| gptq_fuzz::calibration_rows("rows.parquet", file));
