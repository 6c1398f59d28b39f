//! Inputs and weights that are the worst of their kind: each ends in finite weights whose error is no
//! larger than round-to-nearest's, or in an error that says why not.

use burn::tensor::Tensor;
use gptq_format::{Bits, GroupSize};
use gptq_solver::{Settings, SolverError};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::Cpu;

const TOKENS: usize = 256;
const IN: usize = 64;
const OUT: usize = 32;

fn random(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// Quantises weights `w [OUT, IN]` on inputs `x [TOKENS, IN]` at 4 bits in groups of 32.
fn solve(x: Vec<f32>, w: Vec<f32>, damping: f64, sym: bool) -> Result<Subset<Cpu>, SolveError> {
    let tensor = |values: Vec<f32>, rows| -> Tensor<Cpu, 2> {
        let data = TensorData::new(values, [rows, IN]);
        Tensor::from_data(data, (&Default::default(), DType::F32))
    };
    let gram = Cpu::gram_zeros(IN, &Default::default());
    let request = Request {
        weight: tensor(w, OUT),
        settings: Settings {
            bits: Bits::Four,
            group_size: GroupSize::Columns(32),
            sym,
            static_groups: false,
            scale_search: true,
            f16_scales: true,
            refine: 0,
        },
    };
    let hessian = Hessian {
        act_order: true,
        damping,
    };
    let format = match sym {
        true => CheckpointFormat::Gptq,
        false => CheckpointFormat::GptqV2,
    };
    Cpu::solve(
        Cpu::gram_add(gram, tensor(x, TOKENS)),
        None,
        hessian,
        vec![request],
        format,
    )
}

/// The one linear, after checking that everything about it is finite and no worse than rounding.
fn sound(what: &str, subset: &Subset<Cpu>) -> (f64, Vec<f32>) {
    let solved = &subset.solved[0];
    let weights: Vec<f32> = solved.weight.clone().into_data().iter().collect();
    assert!(weights.iter().all(|w| w.is_finite()), "{what}");
    let (error, rtn) = (solved.relative_error, solved.rtn_error);
    assert!(
        error.is_finite() && rtn.is_finite(),
        "{what}: {error} {rtn}"
    );
    // Both may be the same up to the f64 noise of the energies they are quotients of.
    assert!(error <= rtn * (1.0 + 1e-9) + 1e-12, "{what}: {error} {rtn}");
    (error, weights)
}

#[test]
fn extreme_inputs_are_solved_no_worse_than_by_rounding() {
    let scaled = |by: f32| random(1, TOKENS * IN).iter().map(|v| v * by).collect();
    let constant = vec![1.0; TOKENS * IN];
    // 8 directions for 64 columns.
    let (left, right) = (random(2, TOKENS * 8), random(3, 8 * IN));
    let rank_8 = (0..TOKENS * IN)
        .map(|at| {
            let (t, j) = (at / IN, at % IN);
            (0..8).map(|k| left[t * 8 + k] * right[k * IN + j]).sum()
        })
        .collect();
    let mut outlier = random(1, TOKENS * IN);
    outlier
        .iter_mut()
        .skip(5)
        .step_by(IN)
        .for_each(|v| *v *= 1000.0);
    let inputs: [(&str, Vec<f32>); 6] = [
        ("huge", scaled(65504.0)),
        ("tiny", scaled(6e-8)),
        ("constant", constant),
        ("rank 8", rank_8),
        ("outlier channel", outlier),
        ("one token", {
            let mut x = vec![0.0; TOKENS * IN];
            x[..IN].copy_from_slice(&random(4, IN));
            x
        }),
    ];
    for (what, x) in inputs {
        for sym in [true, false] {
            let subset = solve(x.clone(), random(5, OUT * IN), 0.1, sym).unwrap();
            let (error, _) = sound(what, &subset);
            assert_eq!((subset.damping, subset.dead_columns), (0.1, 0), "{what}");
            assert!(error < 0.05, "{what}: {error}");
        }
    }
}

#[test]
fn damping_is_raised_where_the_inputs_allow_no_factor_and_what_was_used_is_told() {
    // All columns the same: without damping the second pivot is 0, or what rounding leaves of it.
    let subset = solve(vec![1.0; TOKENS * IN], random(5, OUT * IN), 0.0, true).unwrap();
    sound("constant", &subset);
    assert_eq!(subset.damping, 0.01, "the first step");
}

#[test]
fn zero_inputs_are_dead_columns() {
    let subset = solve(vec![0.0; TOKENS * IN], random(5, OUT * IN), 0.1, true).unwrap();
    let (error, weights) = sound("zero", &subset);
    assert_eq!((subset.dead_columns, error), (IN, 0.0));
    assert!(weights.iter().all(|&w| w == 0.0));

    let mut x = random(1, TOKENS * IN);
    x.iter_mut().skip(7).step_by(IN).for_each(|v| *v = 0.0);
    let subset = solve(x, random(5, OUT * IN), 0.1, true).unwrap();
    let (_, weights) = sound("one dead column", &subset);
    assert_eq!(subset.dead_columns, 1);
    assert!(weights.iter().skip(7).step_by(IN).all(|&w| w == 0.0));
}

#[test]
fn inputs_that_are_not_finite_are_refused() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
        let mut x = random(1, TOKENS * IN);
        x[3 * IN + 9] = value;
        let error = solve(x, random(5, OUT * IN), 0.1, true).unwrap_err();
        let refused = matches!(error, SolveError::Solver(SolverError::NonFiniteGram { .. }));
        assert!(refused, "{value}: {error}");
    }
}

#[test]
fn extreme_weights_stay_finite() {
    let scaled = |by: f32| -> Vec<f32> { random(5, OUT * IN).iter().map(|v| v * by).collect() };
    let mut outlier = random(5, OUT * IN);
    outlier[17] = 1000.0;
    for (what, w, most) in [
        ("huge", scaled(65504.0), 0.05),
        ("zero", scaled(0.0), 0.0),
        // Smaller than the smallest f16 scale can tell apart: all is lost, and nothing more.
        ("tiny", scaled(6e-8), 1.0),
        ("outlier weight", outlier, 0.05),
    ] {
        for sym in [true, false] {
            let subset = solve(random(1, TOKENS * IN), w.clone(), 0.1, sym).unwrap();
            let (error, _) = sound(what, &subset);
            assert!(error <= most + 1e-9, "{what}: {error}");
        }
    }
}
