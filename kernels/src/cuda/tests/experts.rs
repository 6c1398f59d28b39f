//! The choice of experts, their products and their sums, against the host.

use burn::tensor::Element;
use half::{bf16, f16};

use crate::cuda::{
    combine, cross_add_each, gram_add_each, gram_zeros, linear_each, route,
    testing::{Random, device, distance, rounding, tensor, values, wide},
};
use crate::{Cpu, Engine, Routed, RoutingOptions};

/// Runs of rows, empty ones among them.
const STARTS: [usize; 6] = [0, 0, 5, 38, 38, 70];

fn routed(how: RoutingOptions, tokens: usize, experts: usize, corrected: bool, seed: u64) {
    let Some(device) = device() else { return };
    let mut random = Random(seed);
    let logits = random.halves::<f16>(tokens * experts, 2.0);
    let correction: Vec<f32> = (0..experts).map(|_| random.normal() as f32).collect();
    let correction = corrected.then_some(&correction[..]);
    let found = route(tensor(&logits, [tokens, experts], &device), correction, how).unwrap();
    let wide: Vec<f32> = logits.iter().map(|it| it.to_f32()).collect();
    let expected = Routed::of(&wide, experts, correction, how);
    // Logits are seldom within an f32 rounding of each other.
    let same = found.experts().iter().zip(expected.experts());
    let same = same.filter(|(a, b)| a == b).count();
    assert!(
        same + 2 >= expected.experts().len(),
        "{how:?}: {same} of {}",
        expected.experts().len()
    );
    for (slot, (a, b)) in found.weights().iter().zip(expected.weights()).enumerate() {
        if found.experts()[slot] == expected.experts()[slot] {
            assert!((a - b).abs() <= 1e-5 * b.abs(), "{how:?}: {a} for {b}");
        }
    }
}

#[test]
fn tokens_go_to_the_experts_that_the_host_chooses() {
    for (at, (top_k, experts)) in [(1, 3), (2, 8), (8, 128), (40, 100), (6, 513)]
        .into_iter()
        .enumerate()
    {
        for sigmoid in [false, true] {
            for renormalize in [false, true] {
                let how = RoutingOptions {
                    top_k,
                    sigmoid,
                    renormalize,
                    scale: 1.5,
                };
                routed(how, 77, experts, sigmoid, at as u64);
            }
        }
    }
}

#[test]
fn equal_logits_and_such_that_are_no_numbers_choose_different_experts() {
    let Some(device) = device() else { return };
    for value in [0.5, f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let logits = vec![f16::from_f32(value); 2 * 40];
        for sigmoid in [false, true] {
            let how = RoutingOptions {
                top_k: 40,
                sigmoid,
                renormalize: false,
                scale: 1.0,
            };
            let found = route(tensor(&logits, [2, 40], &device), None, how).unwrap();
            let all: Vec<u32> = (0..40).collect();
            assert_eq!(found.experts(), [all.clone(), all].concat(), "{value}");
        }
    }
}

#[test]
fn each_run_of_rows_is_multiplied_with_its_own_weight() {
    each_product::<f16>();
    each_product::<bf16>();
}

fn each_product<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(3);
    let (rows, inside, out) = (STARTS[5], 96, 64);
    let x = random.halves::<E>(rows * inside, 1.0);
    let weights: Vec<Vec<E>> = (0..5).map(|_| random.halves(out * inside, 0.1)).collect();
    let on_device = weights.iter().map(|it| tensor(it, [out, inside], &device));
    let y = linear_each(
        tensor(&x, [rows, inside], &device),
        &STARTS,
        on_device.collect(),
    )
    .unwrap();
    let mut expected = Vec::new();
    for (run, weight) in STARTS.windows(2).zip(&weights) {
        for row in x[run[0] * inside..run[1] * inside].chunks_exact(inside) {
            let dot =
                |w: &[E]| -> f64 { row.iter().zip(w).map(|(a, b)| wide(*a) * wide(*b)).sum() };
            expected.extend(weight.chunks_exact(inside).map(dot));
        }
    }
    let off = distance(&values(y), &expected);
    assert!(off < rounding::<E>(), "{off}");
    let x = tensor(&x, [rows, inside], &device);
    assert!(linear_each(x, &[0, rows], vec![]).is_err());
}

#[test]
fn each_run_of_rows_is_summed_by_itself() {
    let Some(device) = device() else { return };
    let mut random = Random(4);
    let (rows, n, features) = (STARTS[5], 96, 32);
    let x = random.halves::<f16>(rows * n, 1.0);
    let [dense, own] = [0; 2].map(|_| random.halves::<f16>(rows * features, 1.0));
    let zeros = |shape| {
        (0..5)
            .map(|_| gram_zeros(shape, &device).unwrap())
            .collect()
    };
    let mut grams: Vec<_> = zeros([n, n]);
    let mut crosses: Vec<_> = zeros([features, n]);
    for _ in 0..2 {
        let on_device = || tensor(&x, [rows, n], &device);
        grams = gram_add_each(grams, on_device(), &STARTS).unwrap();
        let pair = [&dense, &own].map(|it| tensor(it, [rows, features], &device));
        crosses = cross_add_each(crosses, pair, on_device(), &STARTS).unwrap();
    }
    for (at, (gram, cross)) in grams.into_iter().zip(crosses).enumerate() {
        let run = STARTS[at]..STARTS[at + 1];
        let row = |of: &[f16], width: usize, at: usize| -> Vec<f64> {
            of[at * width..(at + 1) * width]
                .iter()
                .map(|it| wide(*it))
                .collect()
        };
        let (mut upper, mut whole) = (vec![0.0; n * n], vec![0.0; features * n]);
        for token in run {
            let (x, a, b) = (
                row(&x, n, token),
                row(&dense, features, token),
                row(&own, features, token),
            );
            for i in 0..n {
                for j in i..n {
                    upper[i * n + j] += 2.0 * x[i] * x[j];
                }
            }
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                let off = wide(f16::from_f64(a - b));
                for j in 0..n {
                    whole[i * n + j] += 2.0 * off * x[j];
                }
            }
        }
        let mut found = values(gram);
        for i in 0..n {
            found[i * n..i * n + i].fill(0.0);
        }
        // Below 2 * 33 additions in f32.
        let near = |found: &[f64], expected: &[f64]| {
            found
                .iter()
                .zip(expected)
                .all(|(a, b)| (a - b).abs() < 1e-4)
        };
        assert!(near(&found, &upper), "Gram matrix {at}");
        assert!(near(&values(cross), &whole), "cross {at}");
    }
}

#[test]
fn a_token_gets_the_weighted_sum_of_its_experts_outputs() {
    combined::<f16>();
    combined::<bf16>();
}

fn combined<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(5);
    for (tokens, features, top_k) in [(1, 8, 1), (33, 200, 3), (9, 1030, 8)] {
        let how = RoutingOptions {
            top_k,
            sigmoid: false,
            renormalize: true,
            scale: 1.0,
        };
        let logits: Vec<f32> = (0..tokens * 12).map(|_| random.normal() as f32).collect();
        let routed = Routed::of(&logits, 12, None, how);
        let y = random.halves::<E>(tokens * top_k * features, 1.0);
        let found = combine(tensor(&y, [tokens * top_k, features], &device), &routed).unwrap();
        let y: Vec<f32> = y.iter().map(|it| wide(*it) as f32).collect();
        let y = burn::tensor::TensorData::new(y, [tokens * top_k, features]);
        let y = burn::tensor::Tensor::<Cpu, 2>::from_data(y, &Default::default());
        let expected = Cpu::combine(y, &routed).into_data();
        let expected: Vec<f64> = expected.iter::<f64>().collect();
        let off = distance(&values(found), &expected);
        assert!(off < rounding::<E>(), "{tokens} {features} {top_k}: {off}");
    }
}
