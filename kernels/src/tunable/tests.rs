//! Steps of tuning, on linears whose groups lie in order and scattered.

use super::*;
use crate::{Cpu, Engine};

const OUT: usize = 3;
const IN: usize = 64;
const SIZE: usize = 32;

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let at = |i: u32| (i.wrapping_add(seed * 977).wrapping_mul(2_654_435_761) >> 8) % 2001;
    (0..n as u32).map(|i| at(i) as f32 / 1000.0 - 1.0).collect()
}

fn tensor(values: Vec<f32>) -> Tensor<Cpu, 2> {
    let data = TensorData::new(values, [OUT, IN]);
    Tensor::from_data(data, (&Default::default(), DType::F32))
}

fn values(tensor: Tensor<Cpu, 2>) -> Vec<f32> {
    tensor.into_data().into_vec().unwrap()
}

/// A linear at 3 bits, and its unrounded codes.
fn linear(scattered: bool) -> (QuantizedLinear, Vec<f32>) {
    let unrounded: Vec<f32> = noise(OUT * IN, 1).iter().map(|v| 3.5 + 3.4 * v).collect();
    let code = |i: usize| unrounded[i % OUT * IN + i / OUT].round_ties_even() as u8;
    let group = |column: usize| match scattered {
        true => column % (IN / SIZE),
        false => column / SIZE,
    };
    let scales = [0.5, -0.25, 1.5, 0.125, 3.0, -1.0].map(f16::from_f32);
    let linear = QuantizedLinear {
        bits: Bits::Three,
        in_features: IN,
        out_features: OUT,
        codes: (0..IN * OUT).map(code).collect(),
        scales: scales.to_vec(),
        zeros: vec![4, 3, 4, 2, 4, 4],
        g_idx: (0..IN).map(|column| group(column) as i32).collect(),
    };
    (linear, unrounded)
}

fn tunable(scattered: bool) -> (QuantizedLinear, Tunable<Cpu>) {
    let (linear, unrounded) = linear(scattered);
    let codes = Codes::upload(linear.clone(), &Default::default());
    (linear, Tunable::new(codes, tensor(unrounded)))
}

fn step(number: usize, code_rate: f32, scale_rate: f32) -> TuningStep {
    TuningStep {
        number,
        code_rate,
        scale_rate,
    }
}

#[test]
fn without_a_rate_the_linear_stays_as_it_was_solved() {
    for scattered in [false, true] {
        let (linear, mut tunable) = tunable(scattered);
        let gradient = tensor(noise(OUT * IN, 5));
        let weights = Cpu::tune(&mut tunable, gradient, step(1, 0.0, 0.0), DType::F32);
        assert_eq!(values(weights), linear.dequantize());
        assert_eq!(tunable.on_host(), linear);
    }
}

#[test]
fn the_first_step_moves_every_parameter_by_its_rate_against_its_gradient() {
    for scattered in [false, true] {
        let (linear, mut tunable) = tunable(scattered);
        let gradient = noise(OUT * IN, 5);
        let weights = Cpu::tune(
            &mut tunable,
            tensor(gradient.clone()),
            step(1, 0.125, 0.25),
            DType::F32,
        );
        let (_, unrounded) = self::linear(scattered);
        let found = tunable.on_host();
        let g_idx = |column: usize| linear.g_idx[column] as usize;
        let groups = IN / SIZE;
        let mut expected = vec![0.0; OUT * IN];
        for row in 0..OUT {
            let of_group = |group: usize| (0..IN).filter(move |&c| g_idx(c) == group);
            for group in 0..groups {
                let at = group * OUT + row;
                let (scale, zero) = (linear.scales[at].to_f32(), f32::from(linear.zeros[at]));
                let pull = of_group(group).map(|c| {
                    gradient[row * IN + c] * (f32::from(linear.codes[c * OUT + row]) - zero)
                });
                let pull = pull.sum::<f32>() * scale;
                let scale = f16::from_f32(scale * (1.0 - 0.25 * pull.signum()));
                assert_eq!(found.scales[at], scale, "{row} {group}");
                for c in of_group(group) {
                    let g = gradient[row * IN + c] * scale.to_f32();
                    let moved = unrounded[row * IN + c] - 0.125 * g.signum();
                    let code = moved.round_ties_even().clamp(0.0, 7.0);
                    // A number that lies on a tie may fall either way.
                    let tie = (moved - moved.floor() - 0.5).abs() < 1e-4;
                    assert!(tie || f32::from(found.codes[c * OUT + row]) == code);
                    expected[row * IN + c] = f32::from(found.codes[c * OUT + row]) - zero;
                    expected[row * IN + c] *= scale.to_f32();
                }
            }
        }
        assert_eq!(values(weights), expected);
    }
}

#[test]
fn steps_come_closer_to_weights_that_no_rounding_gives_and_stay_within_reach() {
    let (linear, mut tunable) = tunable(true);
    // Weights of other scales, and some off by a code or two.
    let others = noise(OUT * IN, 9);
    let goal: Vec<f32> = (linear.dequantize().iter().zip(&others))
        .map(|(w, other)| 1.2 * w + 0.3 * other)
        .collect();
    let goal = tensor(goal);
    let loss = |w: &Tensor<Cpu, 2>| {
        let off = w.clone() - goal.clone();
        (off.clone() * off).sum().into_scalar()
    };
    let mut weights = tensor(linear.dequantize());
    let before = loss(&weights);
    for number in 1..=100 {
        let gradient = (weights - goal.clone()) * 2.0;
        weights = Cpu::tune(
            &mut tunable,
            gradient,
            step(number, 0.02, 0.005),
            DType::F32,
        );
    }
    let after = loss(&weights);
    assert!(after < 0.6 * before, "{after} of {before}");
    let found = tunable.on_host();
    let pairs = found.codes.iter().zip(&linear.codes);
    assert!(pairs.clone().any(|(a, b)| a != b));
    assert!(pairs.clone().all(|(a, b)| a.abs_diff(*b) <= 2));
    assert_eq!(found.zeros, linear.zeros);
    assert_eq!(values(weights), found.dequantize());
}

#[test]
fn a_gradient_that_is_no_number_moves_nothing() {
    let (linear, mut tunable) = tunable(false);
    let mut gradient = vec![f32::NAN; OUT * IN];
    gradient[3] = f32::INFINITY;
    let weights = Cpu::tune(
        &mut tunable,
        tensor(gradient),
        step(1, 0.1, 0.1),
        DType::F32,
    );
    assert_eq!(values(weights), linear.dequantize());
    assert_eq!(tunable.on_host(), linear);
}
