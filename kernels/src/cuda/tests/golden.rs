//! The sweep on real layers: AutoGPTQ's 24 recorded cases, on the device and on the host in f32.

use gptq_format::{Bits, GroupSize};
use gptq_solver::{Factor, Settings, output_energy, solve as host_solve};
use half::f16;
use nalgebra::DMatrix;
use safetensors::SafeTensors;
use serde_json::Value;

use super::solving::request;
use crate::HessianOptions;
use crate::cuda::testing::{device, solve_one, tensor_f32};

const STEM: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../tests/golden/autogptq_solver"
);

/// Returns a layer's f16 weights from the file.
fn weights(file: &SafeTensors<'_>, layer: &str) -> Vec<f16> {
    let view = file.tensor(&format!("{layer}/weight")).unwrap();
    let (words, _) = view.data().as_chunks();
    words.iter().map(|b| f16::from_le_bytes(*b)).collect()
}

/// Returns a layer's Hessian, rounded to f32.
fn hessian(file: &SafeTensors<'_>, layer: &str) -> Vec<f32> {
    let view = file.tensor(&format!("{layer}/hessian")).unwrap();
    let (words, _) = view.data().as_chunks();
    words
        .iter()
        .map(|b| f64::from_le_bytes(*b) as f32)
        .collect()
}

fn settings(case: &Value, scale_search: bool) -> Settings {
    let flag = |key: &str| case[key].as_bool().unwrap();
    Settings {
        bits: Bits::try_from(case["bits"].as_u64().unwrap() as u32).unwrap(),
        group_size: GroupSize::try_from(case["group_size"].as_i64().unwrap()).unwrap(),
        sym: flag("sym"),
        static_groups: flag("static_groups"),
        scale_search,
        f16_scales: true,
        refine: 0,
    }
}

/// Compares all cases; the share of equal codes and the ratio of errors must be within bounds.
fn each_case(scale_search: bool, least_share: f64) {
    let Some(device) = device() else { return };
    let bytes = std::fs::read(format!("{STEM}.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let text = std::fs::read(format!("{STEM}.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&text).unwrap();
    assert_eq!(cases.len(), 24);
    for entry in cases {
        let (case, layer) = (&entry["case"], entry["layer"].as_str().unwrap());
        let label = format!("{layer} {} search {scale_search}", case["name"]);
        let (weight, gram) = (weights(&file, layer), hessian(&file, layer));
        let n = gram.len().isqrt();
        let settings = settings(case, scale_search);
        let prepared = HessianOptions {
            act_order: case["desc_act"].as_bool().unwrap(),
            damping: case["damp_percent"].as_f64().unwrap(),
        };
        let subset = solve_one(
            tensor_f32(&gram, [n, n], &device),
            None,
            prepared,
            &[request(&weight, n, settings, &device)],
        )
        .unwrap();
        let solved = subset.solved.into_iter().next().unwrap();
        let found = solved.codes.download();

        let h = DMatrix::from_row_slice(n, n, &gram);
        let w = DMatrix::from_row_iterator(weight.len() / n, n, weight.iter().map(|v| v.to_f32()));
        let factor = Factor::new(&h, prepared.act_order, prepared.damping).unwrap();
        let expected = host_solve(&w, &factor, &settings);
        let energy = |d: DMatrix<f32>| output_energy(&d.map(f64::from), &h.map(f64::from));
        let error = energy(&w - expected.dequantize()) / energy(w.clone());
        let expected = expected.into_quantized();
        let same = found
            .codes
            .iter()
            .zip(&expected.codes)
            .filter(|(a, b)| a == b);
        let share = same.count() as f64 / expected.codes.len() as f64;
        println!(
            "{label}: {share:.5} of the codes, error {:.6} of the host's",
            solved.relative_error / error
        );
        assert!(share >= least_share, "{label}: {share} of the codes agree");
        let q = DMatrix::from_row_slice(w.nrows(), n, &found.dequantize());
        let found_error = energy(&w - q) / energy(w);
        assert!(
            (found_error / error - 1.0).abs() < 0.01,
            "{label}: {found_error} for {error}"
        );
    }
}

#[test]
fn real_layers_give_the_hosts_codes_and_errors() {
    each_case(false, 0.995);
}

#[test]
fn real_layers_with_searched_scales_give_the_hosts_errors() {
    // Two factors whose losses differ only in the last bit may be exchanged, and with them a whole
    // group's codes, without any loss: the error decides.
    each_case(true, 0.98);
}
