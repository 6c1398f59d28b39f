//! Losses, divergence and its gradient, against the formulas in f64.

use burn::tensor::{DType, Int, Tensor, TensorData};

use crate::{Cpu, Engine};

/// Three rows of five logits, and the reference's.
const LOGITS: [f32; 15] = [
    0.5, -1.0, 2.0, 0.0, 0.25, 3.0, 3.0, -2.0, 1.0, 0.0, -4.0, 9.0, 1.5, 0.0, 2.5,
];
const REFERENCE: [f32; 15] = [
    0.0, -0.5, 1.0, 1.5, 0.5, 3.0, 3.0, -2.0, 1.0, 0.0, -3.0, 8.0, 2.5, 0.5, 2.0,
];
const TARGETS: [i32; 3] = [2, 0, 4];

fn rows(values: [f32; 15]) -> Tensor<Cpu, 2> {
    let data = TensorData::new(values.to_vec(), [3, 5]);
    Tensor::from_data(data, (&Default::default(), DType::F32))
}

fn targets() -> Tensor<Cpu, 1, Int> {
    let data = TensorData::new(TARGETS.to_vec(), [3]);
    Tensor::from_data(data, (&Default::default(), DType::I32))
}

/// Log-probabilities of a row, f64.
fn log_p(row: &[f32]) -> Vec<f64> {
    let sum: f64 = row.iter().map(|&v| f64::from(v).exp()).sum();
    row.iter().map(|&v| f64::from(v) - sum.ln()).collect()
}

fn divergence(logits: &[f32], reference: &[f32]) -> f64 {
    let pairs = log_p(reference).into_iter().zip(log_p(logits));
    pairs.map(|(p, q)| p.exp() * (p - q)).sum()
}

fn floats(x: Tensor<Cpu, 2>) -> Vec<f32> {
    x.into_data().into_vec().unwrap()
}

#[test]
fn losses_divergence_and_agreement_are_those_of_the_formulas() {
    let found = floats(Cpu::compare_logits(
        rows(LOGITS),
        rows(REFERENCE),
        targets(),
    ));
    let agreed = [0.0, 1.0, 1.0];
    for row in 0..3 {
        let of = |values: &[f32; 15]| values[row * 5..row * 5 + 5].to_vec();
        let (own, right) = (of(&LOGITS), of(&REFERENCE));
        let target = TARGETS[row] as usize;
        let expected = [
            -log_p(&own)[target],
            -log_p(&right)[target],
            divergence(&own, &right),
            agreed[row],
        ];
        for (found, expected) in found[row * 4..].iter().zip(expected) {
            // Sums of five f32 of at most 12.
            assert!((f64::from(*found) - expected).abs() < 1e-5, "row {row}");
        }
    }
}

#[test]
fn the_gradient_is_that_of_central_differences() {
    let scale = 4.0;
    let [sums, gradient] =
        Cpu::divergence_gradient(rows(LOGITS), rows(REFERENCE), scale, DType::F32);
    let (sums, gradient) = (floats(sums), floats(gradient));
    for row in 0..3 {
        let of = |values: &[f32; 15]| values[row * 5..row * 5 + 5].to_vec();
        let (own, right) = (of(&LOGITS), of(&REFERENCE));
        assert!((f64::from(sums[row]) - divergence(&own, &right)).abs() < 1e-5);
        for column in 0..5 {
            let moved = |by: f32| {
                let mut own = own.clone();
                own[column] += by;
                divergence(&own, &right)
            };
            let slope = (moved(1.0 / 128.0) - moved(-1.0 / 128.0)) * 64.0;
            let found = f64::from(gradient[row * 5 + column]) / f64::from(scale);
            // The third derivative is below 1, the step a 128th.
            assert!(
                (found - slope).abs() < 5e-5,
                "{row}, {column}: {found} {slope}"
            );
        }
    }
}
