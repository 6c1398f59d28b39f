//! Any bytes as `report.json` and, after a zero byte, `verify.json` of a branch: page, table and
//! card.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| gptq_fuzz::report(bytes));
