//! The solver on the device compared with the one on the host.

use burn::tensor::{DType, Element};
use gptq_format::{Bits, GroupSize};
use gptq_solver::{
    Factor, Gains, Settings, Target, output_energy, refine, round_to_nearest, solve as host_solve,
};
use half::{bf16, f16};
use nalgebra::DMatrix;

use crate::cuda::{
    Cuda, Device, Error, cross_add, dequantize, gram_add, gram_zeros, solve,
    testing::{Random, device, distance, rounding, solve_one, tensor, tensor_f32, values, wide},
};
use crate::{Engine, HessianOptions, Mismatch, Problem, Request, Solved, Subset};

/// Makes correlated inputs of very different scales, with the last column dead.
fn inputs<E: Element>(random: &mut Random, tokens: usize, n: usize) -> Vec<E> {
    let common: Vec<f64> = (0..tokens).map(|_| random.normal()).collect();
    let scales: Vec<f64> = (0..n).map(|_| random.normal().exp()).collect();
    (0..tokens * n)
        .map(|at| {
            let (token, column) = (at / n, at % n);
            let value = scales[column] * (random.normal() + common[token]);
            E::from_elem(if column + 1 == n { 0.0 } else { value })
        })
        .collect()
}

pub(super) fn settings(bits: Bits, group_size: GroupSize) -> Settings {
    Settings {
        bits,
        group_size,
        sym: true,
        static_groups: false,
        scale_search: false,
        f16_scales: true,
        refine: 0,
    }
}

/// Makes a request for a weight `[rows, n]` on the device.
pub(super) fn request<E: Element>(
    weight: &[E],
    n: usize,
    settings: Settings,
    device: &Device,
) -> Request<Cuda> {
    Request {
        weight: tensor(weight, [weight.len() / n, n], device),
        settings,
        residual: None,
        keep_unrounded: false,
    }
}

/// Checks a device's result: it must be as accurate as the host's, with nearly the same codes.
///
/// The host solves in f64 here. In f32, sums of up to `n` terms differ in their last bits, and a
/// weight that close to a tie, of which symmetric scales make one per group, is rounded the other
/// way; the rest of its row follows. 0.5 % of the codes is a safe bound; 1 % in bf16, where the
/// activation-mismatch correction uses differences with eight times the rounding error.
pub(super) fn judge<E: Element>(
    label: &str,
    found: Solved<Cuda>,
    weight: &[E],
    gram: &DMatrix<f64>,
    factor: &Factor<f64>,
    target: Option<(&Target<f64>, Option<&DMatrix<f64>>)>,
    settings: &Settings,
) {
    let n = gram.nrows();
    let w = DMatrix::from_row_iterator(weight.len() / n, n, weight.iter().map(|v| wide(*v)));
    let energy = output_energy(&w, gram);
    let (target, closer) = match target {
        Some((target, residual)) => {
            let (target, gains) = target.of(&w, residual);
            (target, Some(gains.iter().sum::<f64>() / energy))
        }
        None => (w.clone(), None),
    };
    let mut expected = host_solve(&target, factor, settings);
    let refined = refine(&target, gram, factor, &mut expected, settings.refine);
    let gains = Gains {
        scale_search: settings
            .scale_search
            .then_some(expected.search_gains.iter().sum::<f64>() / energy),
        mismatch_correction: closer,
        refine: (settings.refine > 0).then_some(refined.gains.iter().sum::<f64>() / energy),
    };
    let lost = |q: DMatrix<f64>| output_energy(&(&w - q), gram) / energy;
    let expected_error = lost(expected.dequantize());
    let objective = output_energy(&(&target - expected.dequantize()), gram) / energy;
    let rtn_error = lost(round_to_nearest(&w, settings).dequantize());
    let expected = expected.into_quantized();

    let packed = Cuda::pack(found.codes.clone()).wait();
    let codes = found.codes.download();
    assert!(packed == codes.pack(), "{label}: packed on the device");
    assert_eq!(codes.g_idx, expected.g_idx, "{label}");
    let pairs = codes.codes.iter().zip(&expected.codes);
    let same = pairs.filter(|(a, b)| a == b).count();
    let share = same as f64 / expected.codes.len() as f64;
    let least = if E::dtype() == DType::BF16 {
        0.99
    } else {
        0.995
    };
    assert!(share >= least, "{label}: {share} of the codes agree");

    let dense = values(found.weight.clone());
    let unpacked = dequantize(&packed, E::dtype(), &found.weight.device()).unwrap();
    assert!(
        values(unpacked) == dense,
        "{label}: packed and dense differ"
    );

    let close = |a: f64, b: f64| (a / b - 1.0).abs();
    // bf16 products with random signs, see `relative_error`: 2^-8 a term, of which a few of the columns, with the largest
    // inputs, make up the sum.
    let dense = lost(DMatrix::from_row_slice(w.nrows(), n, &dense));
    let off = close(found.relative_error, dense);
    assert!(off < 4e-3, "{label}: {} for {dense}", found.relative_error);
    // The few codes that differ, and the weights' rounding: independent of the codes', it adds at
    // most its square, `r²` of the energy.
    let rounded = rounding::<E>().powi(2);
    let near = |found: f64, exact: f64| close(found, exact) < 1e-2 + rounded / exact;
    assert!(
        near(found.relative_error, expected_error),
        "{label}: {} for {expected_error}",
        found.relative_error
    );
    assert!(near(found.rtn_error, rtn_error), "{label}: rtn");
    assert!(
        near(found.objective.unwrap(), objective),
        "{label}: objective {} for {objective}",
        found.objective.unwrap()
    );
    let nearest = DMatrix::from_row_slice(w.nrows(), n, &values(found.nearest));
    assert!(
        close(lost(nearest), found.rtn_error) < 2e-3,
        "{label}: the nearest weights"
    );
    // Sums of many differences of codes and groups; rounding of weights and of the mismatch adds as
    // above.
    let names: Vec<_> = gains.used().map(|(name, _)| name).collect();
    assert_eq!(
        found.gains.used().map(|(name, _)| name).collect::<Vec<_>>(),
        names,
        "{label}"
    );
    for ((name, found), (_, exact)) in found.gains.used().zip(gains.used()) {
        let bound = 3e-2 * exact + 2.0 * rounded;
        assert!(
            (found - exact).abs() < bound,
            "{label}: {name} gained {found} for {exact}"
        );
    }
}

/// Compares two layers of one random input with the host.
fn compare(n: usize, rows: [usize; 2], settings: Settings, act_order: bool, seed: u64) {
    compare_of::<f16>(n, rows, settings, act_order, seed);
}

fn compare_of<E: Element>(
    n: usize,
    rows: [usize; 2],
    settings: Settings,
    act_order: bool,
    seed: u64,
) {
    let Some(device) = device() else { return };
    let mut random = Random(seed);
    let tokens = 3 * n;
    // Three inputs that are alike, of which the first is also solved alone.
    let inputs = [0; 3].map(|_| {
        let x = inputs::<E>(&mut random, tokens, n);
        (x, rows.map(|rows| random.halves::<E>(rows * n, 0.05)))
    });
    let problem = |(x, weights): &(Vec<E>, [Vec<E>; 2])| {
        let x = tensor(x, [tokens, n], &device);
        Problem {
            gram: gram_add(gram_zeros([n, n], &device).unwrap(), x).unwrap(),
            mismatch: None,
            requests: weights
                .each_ref()
                .map(|it| request(it, n, settings, &device))
                .to_vec(),
        }
    };
    let hessian = HessianOptions {
        act_order,
        damping: 0.1,
    };
    let together = solve(inputs.iter().map(problem).collect(), hessian).unwrap();
    assert_eq!(together.len(), 3);
    let alone = solve(vec![problem(&inputs[0])], hessian).unwrap();
    let known = inputs.iter().map(|(x, weights)| {
        let x = DMatrix::from_row_iterator(tokens, n, x.iter().map(|v| wide(*v)));
        let gram = x.transpose() * x;
        (Factor::new(&gram, act_order, 0.1).unwrap(), gram, weights)
    });
    let known: Vec<_> = known.collect();
    let subsets = alone
        .into_iter()
        .zip(&known)
        .chain(together.into_iter().zip(&known));
    for (subset, (factor, gram, weights)) in subsets {
        assert_eq!(subset.dead_columns, 1);
        assert!((subset.damping - 0.1).abs() < 1e-12);
        for (solved, weight) in subset.solved.into_iter().zip(*weights) {
            let label = format!(
                "{n} {} {settings:?} act order {act_order}",
                weight.len() / n
            );
            judge(&label, solved, weight, gram, factor, None, &settings);
        }
    }
}

/// Number of rows of an output projection, above the limit of a grid's second dimension.
#[test]
fn more_rows_than_a_grid_is_high_are_solved_as_any_others() {
    let settings = Settings {
        scale_search: true,
        ..settings(Bits::Four, GroupSize::Columns(32))
    };
    compare(64, [70_016, 32], settings, true, 97);
}

#[test]
fn codes_agree_with_the_host_at_every_bit_width() {
    for (bits, seed) in Bits::ALL.into_iter().zip(20..) {
        let group = GroupSize::Columns(64);
        compare(256, [64, 32], settings(bits, group), true, seed);
    }
}

#[test]
fn codes_of_bf16_weights_agree_with_the_host() {
    for (bits, seed) in Bits::ALL.into_iter().zip(24..) {
        let s = settings(bits, GroupSize::Columns(64));
        compare_of::<bf16>(256, [64, 32], s, true, seed);
    }
    let searched = Settings {
        scale_search: true,
        refine: 1,
        ..settings(Bits::Four, GroupSize::Columns(160))
    };
    compare_of::<bf16>(480, [32, 64], searched, true, 28);
    let fixed = Settings {
        static_groups: true,
        sym: false,
        ..settings(Bits::Four, GroupSize::Columns(32))
    };
    compare_of::<bf16>(288, [32, 32], fixed, false, 29);
}

#[test]
fn codes_agree_with_the_host_at_every_group_size() {
    let sizes = [32, 96, 128, 160, 512].map(GroupSize::Columns);
    for (at, group) in [GroupSize::Row].into_iter().chain(sizes).enumerate() {
        let s = settings(Bits::Four, group);
        compare(480, [32, 64], s, at % 2 == 0, 30 + at as u64);
    }
}

#[test]
fn codes_agree_with_the_host_for_asymmetric_and_static_groups() {
    let asymmetric = |bits, columns| Settings {
        sym: false,
        ..settings(bits, GroupSize::Columns(columns))
    };
    compare(288, [32, 32], asymmetric(Bits::Four, 32), false, 40);
    compare(288, [32, 32], asymmetric(Bits::Three, 128), true, 41);
    let fixed = Settings {
        static_groups: true,
        ..settings(Bits::Four, GroupSize::Columns(32))
    };
    compare(288, [32, 32], fixed, true, 42);
    compare(288, [32, 32], fixed, false, 43);
}

#[test]
fn searched_scales_agree_with_the_host() {
    let searched = |bits, group| Settings {
        scale_search: true,
        ..settings(bits, group)
    };
    let group = GroupSize::Columns;
    compare(256, [64, 32], searched(Bits::Four, group(128)), true, 70);
    compare(256, [64, 32], searched(Bits::Two, group(64)), true, 71);
    compare(480, [32, 64], searched(Bits::Three, group(160)), true, 72);
    compare(
        288,
        [32, 32],
        searched(Bits::Eight, GroupSize::Row),
        true,
        73,
    );
    let fixed = Settings {
        static_groups: true,
        ..searched(Bits::Four, group(32))
    };
    compare(288, [32, 32], fixed, true, 74);
    let asymmetric = Settings {
        sym: false,
        ..searched(Bits::Four, group(96))
    };
    compare(288, [32, 32], asymmetric, true, 75);
}

#[test]
fn refined_codes_agree_with_the_host() {
    let refined = |bits, columns, refine| Settings {
        refine,
        scale_search: true,
        ..settings(bits, GroupSize::Columns(columns))
    };
    compare(256, [64, 32], refined(Bits::Two, 64, 1), true, 80);
    compare(1312, [96, 32], refined(Bits::Three, 32, 1), true, 81);
    compare(480, [32, 64], refined(Bits::Four, 160, 2), true, 82);
    let asymmetric = Settings {
        sym: false,
        static_groups: true,
        ..refined(Bits::Four, 32, 1)
    };
    compare(288, [32, 32], asymmetric, true, 83);
}

#[test]
fn drifted_inputs_are_made_up_for_as_on_the_host() {
    drifted_of::<f16>();
    drifted_of::<bf16>();
}

fn drifted_of<E: Element>() {
    let Some(device) = device() else { return };
    for (n, rows, strength, seed) in [(256, 64, 1.0, 90), (1312, 32, 0.5, 91), (32, 96, 1.0, 92)] {
        let mut random = Random(seed);
        let tokens = 3 * n;
        let x = inputs::<E>(&mut random, tokens, n);
        let dense: Vec<E> = x
            .iter()
            .map(|v| E::from_elem(wide(*v) * (1.0 + 0.3 * random.normal())))
            .collect();
        let weight = random.halves::<E>(rows * n, 0.05);
        let s = settings(Bits::Four, GroupSize::Columns(32));
        let [x_here, dense_here] = [&x, &dense].map(|v| tensor(v, [tokens, n], &device));
        let gram = gram_add(gram_zeros([n, n], &device).unwrap(), x_here.clone()).unwrap();
        let cross = gram_zeros([n, n], &device).unwrap();
        let cross = cross_add(cross, [dense_here, x_here.clone()], x_here).unwrap();
        let mismatch = Mismatch {
            gram: gram.clone(),
            cross: cross.clone(),
            strength,
        };
        let residual = (0..rows * n).map(|_| 5.0 * random.normal() as f32);
        let residual: Vec<f32> = residual.collect();
        let hessian = HessianOptions {
            act_order: true,
            damping: 0.1,
        };
        let mut requests = [0, 1].map(|_| request(&weight, n, s, &device));
        requests[1].residual = Some(tensor_f32(&residual, [rows, n], &device));
        // Twice the same, in one batch: the second in the middle of the buffers.
        let problem = Problem {
            gram,
            mismatch: Some(mismatch),
            requests: requests.to_vec(),
        };
        let subsets = solve(vec![problem.clone(), problem], hessian).unwrap();

        let [x, dense] =
            [x, dense].map(|v| DMatrix::from_row_iterator(tokens, n, v.iter().map(|v| wide(*v))));
        let gram = x.transpose() * &x;
        let expected = (dense - &x).transpose() * x;
        let row_major: Vec<f64> = expected.transpose().iter().copied().collect();
        // The difference is rounded once, at random signs.
        let off = distance(&values(cross), &row_major);
        assert!(off < rounding::<E>(), "{n}: {off}");
        let factor = Factor::new(&gram, true, 0.1).unwrap();
        let target = Target::new(&gram, expected, 0.1, strength).unwrap();
        let residual = residual.iter().map(|&v| f64::from(v));
        let residual = DMatrix::from_row_iterator(rows, n, residual);
        let solved = subsets.into_iter().flat_map(|subset| subset.solved);
        for (solved, residual) in solved.zip([None, Some(&residual)].into_iter().cycle()) {
            let label = format!("{n} {rows} {strength} {}", residual.is_some());
            let target = Some((&target, residual));
            judge(&label, solved, &weight, &gram, &factor, target, &s);
        }
    }
}

#[test]
fn codes_agree_with_the_host_where_columns_cross_a_stretch() {
    let s = settings(Bits::Four, GroupSize::Columns(128));
    compare(1312, [32, 32], s, true, 50);
}

#[test]
fn the_smallest_layer_is_solved() {
    let s = settings(Bits::Four, GroupSize::Columns(128));
    compare(32, [32, 64], s, true, 51);
}

/// Solves one layer of 64 columns with `gram` and little damping.
fn solve_indefinite(gram: &[f32], device: &Device) -> Result<Subset<Cuda>, Error> {
    let n = gram.len().isqrt();
    let s = settings(Bits::Four, GroupSize::Columns(32));
    let weight = Random(60).halves::<f16>(32 * n, 0.05);
    let hessian = HessianOptions {
        act_order: false,
        damping: 0.001,
    };
    let gram = tensor_f32(gram, [n, n], device);
    solve_one(gram, None, hessian, &[request(&weight, n, s, device)])
}

#[test]
fn a_failing_factorisation_raises_the_damping_as_the_host_does() {
    let Some(device) = device() else { return };
    let n = 64;
    // Indefinite: eigenvalues 1 + 63 c and 1 - c with c = 1.03, so a damping over 0.03 helps.
    let gram = |c: f32| -> Vec<f32> {
        (0..n * n)
            .map(|at| if at / n == at % n { 1.0 } else { c })
            .collect()
    };
    let host = DMatrix::from_row_iterator(n, n, gram(1.03).into_iter().map(f64::from));
    let expected = Factor::new(&host, false, 0.001).unwrap().damping;
    assert_eq!(expected, 0.04);
    let subset = solve_indefinite(&gram(1.03), &device).unwrap();
    assert_eq!(subset.damping, expected);
    let failure = solve_indefinite(&gram(3.0), &device);
    assert!(matches!(failure, Err(Error::NotPositiveDefinite { .. })));
}

#[test]
fn the_widest_factor_solves_as_the_host_does_on_a_diagonal() {
    let Some(device) = device() else { return };
    // With a diagonal Gram matrix GPTQ is round to nearest, which needs no factor on the host.
    let n = 11_008;
    let mut gram = vec![0.0; n * n];
    for k in 0..n {
        gram[k * (n + 1)] = 1.0 + (k * 37 % 101) as f32;
    }
    let s = settings(Bits::Four, GroupSize::Columns(128));
    let weight = Random(80).halves::<f16>(32 * n, 0.05);
    let hessian = HessianOptions {
        act_order: false,
        damping: 0.1,
    };
    let gram = tensor_f32(&gram, [n, n], &device);
    let subset = solve_one(gram, None, hessian, &[request(&weight, n, s, &device)]).unwrap();
    let w = DMatrix::from_row_iterator(32, n, weight.iter().map(|v| wide(*v)));
    let expected = round_to_nearest(&w, &s).into_quantized();
    let solved = subset.solved.into_iter().next().unwrap();
    let found = solved.codes.download();
    let same = found
        .codes
        .iter()
        .zip(&expected.codes)
        .filter(|(a, b)| a == b);
    let share = same.count() as f64 / expected.codes.len() as f64;
    // The last f32 bit of a scale before rounding to f16 sometimes differs from f64's.
    assert!(share >= 0.999, "{share} of the codes agree");
}
