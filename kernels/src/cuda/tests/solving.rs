//! The solver on the device against the one on the host.

use half::f16;

use super::reference;
use crate::cuda::{
    Error, Settings, SolveOptions, ZeroOffset, dequantise, gram_add, gram_zeros, solve,
    testing::{Random, device, tensor, tensor_f32, values},
};

/// Correlated inputs of very different scales, the last column dead.
fn inputs(random: &mut Random, tokens: usize, n: usize) -> Vec<f16> {
    let common: Vec<f64> = (0..tokens).map(|_| random.normal()).collect();
    let scales: Vec<f64> = (0..n).map(|_| random.normal().exp()).collect();
    (0..tokens * n)
        .map(|at| {
            let (token, column) = (at / n, at % n);
            let value = scales[column] * (random.normal() + common[token]);
            f16::from_f64(if column + 1 == n { 0.0 } else { value })
        })
        .collect()
}

const fn settings(bits: u32, group: Option<usize>, symmetric: bool) -> Settings {
    Settings {
        bits,
        group_size: group,
        symmetric,
        static_groups: false,
    }
}

/// The codes in a packed matrix, by row and column.
fn codes(words: &[i64], rows: usize, n: usize, bits: usize) -> Vec<i32> {
    (0..rows * n)
        .map(|at| {
            let (row, column) = (at / n, at % n);
            let bit = column % 32 * bits;
            let word = |k: usize| words[(column / 32 * bits + k) * rows + row] as u32;
            let mut code = word(bit / 32) >> (bit % 32);
            if bit % 32 + bits > 32 {
                code |= word(bit / 32 + 1) << (32 - bit % 32);
            }
            (code & ((1 << bits) - 1)) as i32
        })
        .collect()
}

fn compare(n: usize, rows: [usize; 2], settings: Settings, activation_order: bool, seed: u64) {
    let Some(device) = device() else { return };
    let mut random = Random(seed);
    let tokens = 3 * n;
    let x = inputs(&mut random, tokens, n);
    let weights = rows.map(|rows| random.halves(rows * n, 0.05));
    let gram = gram_add(
        gram_zeros(n, &device).unwrap(),
        tensor(&x, [tokens, n], &device),
    )
    .unwrap();
    let zero_offset = if settings.symmetric {
        ZeroOffset::MinusOne
    } else {
        ZeroOffset::None
    };
    let layers = [0, 1].map(|at| (tensor(&weights[at], [rows[at], n], &device), settings));
    let options = SolveOptions {
        tokens,
        activation_order,
        damping: 0.1,
        zero_offset,
    };
    let solution = solve(gram, &layers, options).unwrap();
    assert_eq!(solution.dead_columns, 1);
    assert!((solution.damping - 0.1).abs() < 1e-12);
    let gram = reference::gram(&x, n);
    for (layer, weight) in solution.layers.into_iter().zip(&weights) {
        let rows = weight.len() / n;
        let expected = reference::solve(&gram, n, weight, settings, tokens, activation_order, 0.1);
        let words: Vec<i64> = layer.packed.qweight.clone().into_data().iter().collect();
        let found = codes(&words, rows, n, settings.bits as usize);
        let equal = |at: usize| found[at] == expected.codes[at];
        let same = (0..found.len()).filter(|&at| equal(at)).count();
        let by_position: Vec<usize> = expected
            .order
            .chunks(32)
            .map(|columns| {
                let pairs = columns
                    .iter()
                    .flat_map(|c| (0..rows).map(move |r| r * n + c));
                pairs.filter(|&at| !equal(at)).count()
            })
            .collect();
        let label = format!("{n} {rows} {settings:?} act order {activation_order}");
        let share = same as f64 / found.len() as f64;
        assert!(
            share >= 0.995,
            "{label}: {share} of the codes agree; differences by 32 positions: {by_position:?}"
        );

        let g_idx: Vec<usize> = layer
            .packed
            .g_idx
            .clone()
            .into_data()
            .iter::<i64>()
            .map(|g| g as usize)
            .collect();
        assert_eq!(g_idx, expected.group, "{label}");

        let dense = values(layer.weight);
        let unpacked = dequantise(&layer.packed, settings.bits, zero_offset).unwrap();
        assert!(
            values(unpacked) == dense,
            "{label}: packed and dense differ"
        );

        let w: Vec<f64> = weight.iter().map(|v| v.to_f64()).collect();
        let lost = |approximation: &[f64]| -> f64 {
            let d: Vec<f64> = w.iter().zip(approximation).map(|(a, b)| a - b).collect();
            reference::energy(&gram, n, &d) / reference::energy(&gram, n, &w)
        };
        let close = |a: f64, b: f64| (a / b - 1.0).abs();
        // bf16 products with random signs: far under 1e-3, see `relative_error`.
        assert!(close(layer.relative_error, lost(&dense)) < 2e-3, "{label}");
        // f16 outputs, and the few codes that differ.
        let expected_error = lost(&expected.weight);
        assert!(
            close(layer.relative_error, expected_error) < 1e-2,
            "{label}: {} for {expected_error}",
            layer.relative_error
        );
        assert!(layer.relative_error <= layer.rtn_error * 1.02, "{label}");
    }
}

#[test]
fn codes_agree_with_the_reference_at_every_bit_width() {
    for (bits, seed) in [(2, 20), (3, 21), (4, 22), (8, 23)] {
        compare(256, [64, 32], settings(bits, Some(64), true), true, seed);
    }
}

#[test]
fn codes_agree_with_the_reference_at_every_group_size() {
    for (at, group) in [None, Some(32), Some(96), Some(128), Some(160), Some(512)]
        .into_iter()
        .enumerate()
    {
        let s = settings(4, group, true);
        compare(480, [32, 64], s, at % 2 == 0, 30 + at as u64);
    }
}

#[test]
fn codes_agree_with_the_reference_for_asymmetric_and_static_groups() {
    compare(288, [32, 32], settings(4, Some(32), false), false, 40);
    compare(288, [32, 32], settings(3, Some(128), false), true, 41);
    let fixed = Settings {
        static_groups: true,
        ..settings(4, Some(32), true)
    };
    compare(288, [32, 32], fixed, true, 42);
    compare(288, [32, 32], fixed, false, 43);
}

#[test]
fn codes_agree_with_the_reference_where_columns_cross_a_stretch() {
    compare(1312, [32, 32], settings(4, Some(128), true), true, 50);
}

#[test]
fn the_smallest_layer_is_solved() {
    compare(32, [32, 64], settings(4, Some(128), true), true, 51);
}

#[test]
fn a_failing_factorisation_raises_the_damping_and_says_so() {
    let Some(device) = device() else { return };
    let n = 64;
    // Indefinite: eigenvalues 1 + 63 c and 1 - c with c = 1.02, so a damping over 0.02 helps.
    let gram: Vec<f32> = (0..n * n)
        .map(|at| if at / n == at % n { 1.0 } else { 1.02 })
        .collect();
    let mut random = Random(60);
    let weight = random.halves(32 * n, 0.05);
    let layer = (
        tensor(&weight, [32, n], &device),
        settings(4, Some(32), true),
    );
    let options = SolveOptions {
        tokens: 100,
        activation_order: false,
        damping: 0.01,
        zero_offset: ZeroOffset::MinusOne,
    };
    let solution = solve(
        tensor_f32(&gram, [n, n], &device),
        std::slice::from_ref(&layer),
        options,
    )
    .unwrap();
    assert!(solution.damping > 0.02 && solution.damping <= 0.04);

    let hopeless: Vec<f32> = gram
        .iter()
        .map(|&v| if v == 1.0 { 1.0 } else { 3.0 })
        .collect();
    let failure = solve(tensor_f32(&hopeless, [n, n], &device), &[layer], options);
    assert!(matches!(failure, Err(Error::NotPositiveDefinite { .. })));
}

#[test]
fn asymmetric_layers_are_refused_in_the_first_format() {
    let Some(device) = device() else { return };
    let weight = tensor(&[f16::ONE; 32 * 32], [32, 32], &device);
    let options = SolveOptions {
        tokens: 1,
        activation_order: false,
        damping: 0.1,
        zero_offset: ZeroOffset::MinusOne,
    };
    let gram = tensor_f32(&[1.0; 32 * 32], [32, 32], &device);
    let failure = solve(gram, &[(weight, settings(4, None, false))], options);
    assert!(matches!(failure, Err(Error::AsymmetricNeedsV2)));
}
