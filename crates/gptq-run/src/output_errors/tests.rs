//! Comparison with the formula in f64, on every engine.

use std::path::Path;

use burn::tensor::TensorData;
use gptq_kernels::{Device, Work};
use gptq_model::Model;
use gptq_plan::{Places, SHARE, Share};

use super::*;
use crate::moved::LOST;
use crate::stream::{Span, StateStorage};

const TOKENS: usize = 80;

/// Returns a matrix's rows in f64.
fn rows<B: Engine>(x: Tensor<B, 2>) -> Vec<Vec<f64>> {
    let columns = x.dims()[1];
    let values = x.cast(DType::F32).into_data().to_vec::<f32>().unwrap();
    let wide: Vec<f64> = values.into_iter().map(f64::from).collect();
    wide.chunks_exact(columns).map(<[f64]>::to_vec).collect()
}

/// `x wᵀ`.
fn product(x: &[Vec<f64>], w: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum();
    let row = |x: &Vec<f64>| w.iter().map(|w| dot(x, w)).collect();
    x.iter().map(row).collect()
}

fn squared(x: &[Vec<f64>]) -> f64 {
    x.iter().flatten().map(|v| v * v).sum()
}

/// `‖a - b‖²`.
fn apart(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    let rows = a.iter().zip(b).flat_map(|(a, b)| a.iter().zip(b));
    rows.map(|(a, b)| (a - b).powi(2)).sum()
}

/// Returns deterministic values uniform in ±`size`.
fn noise<B: Engine>(shape: [usize; 2], size: f32, seed: u64, like: &Tensor<B, 2>) -> Tensor<B, 2> {
    let mut state = seed;
    let one = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / 8_388_608.0 - 1.0) * size
    };
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(one).collect();
    let data = TensorData::new(values, shape).convert_dtype(like.dtype());
    Tensor::from_data(data, (&like.device(), like.dtype()))
}

/// Two branches through the bundled model's first block: one with errors typical of 8 bits, one of
/// 2 bits.
struct Compared;

impl Work for Compared {
    type Output = ();

    fn run<B: Engine>(self, device: B::Device) {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/models/medi-tiny");
        let model = Model::<B>::open(Path::new(dir), &device).unwrap();
        let half = model.state_half();
        let windows: Vec<Vec<u32>> = (0..3)
            .map(|w| {
                (0..TOKENS as u32)
                    .map(|t| 3 + (t * t + 7 * w) % 900)
                    .collect()
            })
            .collect();
        let flows = model.flows(&windows, 2, gptq_kernels::dtype(half)).unwrap();
        let keep = StateStorage { half, clamp: false };
        let place = (Span { first: 0, of: 2 }, model.config().hidden_size);
        let all = Stream::new(flows, place, 1, Vec::new(), &Places::DEVICE, None, keep).unwrap();
        let share = Share {
            windows: 1,
            tokens: 64,
        };
        let mut errors = OutputErrors::begin(all.sample(SHARE, share.tokens, &device).unwrap(), 2);
        let mut clock = Clock::new(false);
        let block = model.block(0).unwrap();
        errors.enter(&block, true, &device, &mut clock).unwrap();
        for (branch, size) in [(0, 2e-4), (1, 3e-2)] {
            let mut own = block.clone();
            for tap in block.spec().taps() {
                let solved = block.spec().linears_of(tap).map(|linear| {
                    let weight = block.linear(linear).weight.dense(model.dtype());
                    let seed = 10 * linear as u64;
                    let near =
                        |seed, size| weight.clone() + noise(weight.dims(), size, seed, &weight);
                    (linear, [near(seed, size), near(seed + 1, 2.0 * size)])
                });
                let solved: Vec<_> = solved.collect();
                let given: Vec<_> = solved.iter().map(|(p, w)| (*p, [&w[0], &w[1]])).collect();
                let found = errors
                    .linears(branch, tap, &own, &given, &device, &mut clock)
                    .unwrap();
                let states = |stream: &Stream<B>| {
                    rows(input(&block, tap, &stream.chunks[0], &device).unwrap())
                };
                let (x, own_x) = (
                    states(errors.dense.before(tap)),
                    states(&errors.own[branch]),
                );
                assert_eq!(x.len(), 64);
                for ((linear, weights), found) in solved.into_iter().zip(found) {
                    let dense = block.linear(linear).weight.dense(model.dtype());
                    let right = product(&x, &rows(dense));
                    let [output, nearest] = weights.clone().map(|weight| {
                        apart(&product(&own_x, &rows(weight)), &right) / squared(&right)
                    });
                    // Products of 16-bit numbers, rounded to 11 bits in f16: each by at most 2^-12
                    // of itself, or f32 if the engine computes in it.
                    let close = |found: f64, exact: f64| (found / exact - 1.0).abs() < 2e-3;
                    let what = format!("{branch} {linear}: {found:?} for {output} {nearest}");
                    assert!(close(found.output, output), "{what}");
                    assert!(close(found.nearest, nearest), "{what}");
                    let [weight, _] = weights;
                    own.set_weight(linear, weight);
                }
                errors
                    .advance(branch, tap, &own, &device, &mut clock)
                    .unwrap();
            }
            let ends = [errors.dense.end(), &errors.own[branch]];
            let [y, own_y] = ends.map(|end| rows(end.chunks[0].flow(&device).unwrap().residual));
            let lost = y.iter().zip(&own_y).map(|(y, own)| {
                let pair = [std::slice::from_ref(y), std::slice::from_ref(own)];
                apart(pair[0], pair[1]) / squared(pair[0])
            });
            let exact = lost.sum::<f64>() / 64.0;
            let found = errors.block(branch, &device).unwrap();
            assert!((found / exact - 1.0).abs() < 1e-5, "{found} for {exact}");
            assert!(found > 0.0);
        }
    }
}

#[test]
fn output_errors_are_those_of_the_formula_in_f64() {
    Device::Cpu.run(Compared).unwrap();
}

#[test]
fn output_errors_are_those_of_the_formula_in_f64_on_the_device() {
    match Device::Cuda(0).resolve() {
        Ok(device) => device.run(Compared).unwrap(),
        Err(_) => println!("skipped: no CUDA device"),
    }
}

#[test]
fn an_error_that_is_not_finite_is_a_large_number() {
    assert_eq!(part(0.0, 0.0), 0.0);
    assert_eq!(part(1.0, 0.0), LOST);
    assert_eq!(part(f64::NAN, 1.0), LOST);
    assert_eq!(part(1.0, 4.0), 0.25);
    assert_eq!(bounded(f64::INFINITY), LOST);
}
