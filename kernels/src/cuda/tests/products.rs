//! The Gram matrix and the linear layer.

use burn::tensor::Element;
use half::{bf16, f16};

use crate::cuda::{
    cross_add, gram_add, gram_zeros, linear, relative_error,
    testing::{Random, device, distance, rounding, tensor, values, wide},
};

#[test]
fn the_upper_half_of_the_gram_matrix_is_the_sum_over_two_batches() {
    gram_of::<f16>();
    gram_of::<bf16>();
}

fn gram_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(1);
    for (tokens, n) in [(1, 1), (17, 31), (300, 127), (64, 240), (40, 1030)] {
        let batches: Vec<_> = (0..2)
            .map(|_| random.halves::<E>(tokens * n, 1.0))
            .collect();
        let mut gram = gram_zeros([n, n], &device).unwrap();
        for x in &batches {
            gram = gram_add(gram, tensor(x, [tokens, n], &device)).unwrap();
        }
        let found = values(gram);
        let mut upper = (Vec::new(), Vec::new());
        for i in 0..n {
            for j in i..n {
                let expected: f64 = batches
                    .iter()
                    .flat_map(|x| x.chunks_exact(n))
                    .map(|row| wide(row[i]) * wide(row[j]))
                    .sum();
                upper.0.push(found[i * n + j]);
                upper.1.push(expected);
            }
        }
        // At most 2 * tokens additions in f32, each off by at most 2^-23 of the running sum
        // (tensor cores may truncate).
        let bound = (2 * tokens) as f64 * 2.0_f64.powi(-23);
        let found = distance(&upper.0, &upper.1);
        assert!(found < bound, "{tokens} x {n}: {found} over {bound}");
    }
}

#[test]
fn a_linear_layer_is_x_times_w_transposed() {
    linear_of::<f16>();
    linear_of::<bf16>();
}

fn linear_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(2);
    for (tokens, inside, out) in [(1, 1, 1), (31, 127, 240), (127, 240, 31), (5, 4096, 64)] {
        let x = random.halves::<E>(tokens * inside, 1.0);
        let w = random.halves::<E>(out * inside, 0.05);
        let y = linear(
            tensor(&x, [tokens, inside], &device),
            tensor(&w, [out, inside], &device),
        );
        let expected: Vec<f64> = x
            .chunks_exact(inside)
            .flat_map(|x| {
                w.chunks_exact(inside)
                    .map(|w| x.iter().zip(w).map(|(a, b)| wide(*a) * wide(*b)).sum())
                    .collect::<Vec<f64>>()
            })
            .collect();
        // The output is rounded once.
        let found = distance(&values(y.unwrap()), &expected);
        assert!(
            found < rounding::<E>(),
            "{tokens} x {inside} x {out}: {found}"
        );
    }
}

#[test]
fn the_relative_error_is_that_of_the_outputs() {
    relative_error_of::<f16>();
    relative_error_of::<bf16>();
}

fn relative_error_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(3);
    let (tokens, n, out) = (400, 240, 96);
    let scales: Vec<f64> = (0..n).map(|_| (3.0 * random.normal()).exp()).collect();
    let x: Vec<_> = random
        .halves::<E>(tokens * n, 1.0)
        .iter()
        .enumerate()
        .map(|(at, v)| E::from_elem(wide(*v) * scales[at % n].min(1e3)))
        .collect();
    let w = random.halves::<E>(out * n, 0.05);
    let near: Vec<_> = w
        .iter()
        .map(|v| E::from_elem(wide(*v) + 0.002 * random.normal()))
        .collect();
    let gram = gram_add(
        gram_zeros([n, n], &device).unwrap(),
        tensor(&x, [tokens, n], &device),
    );
    let found = relative_error(
        gram.unwrap(),
        tensor(&w, [out, n], &device),
        tensor(&near, [out, n], &device),
    )
    .unwrap();
    let energy = |weight: &dyn Fn(usize) -> f64| -> f64 {
        x.chunks_exact(n)
            .flat_map(|x| {
                (0..out).map(move |r| {
                    let y: f64 = (0..n).map(|c| wide(x[c]) * weight(r * n + c)).sum();
                    y * y
                })
            })
            .sum()
    };
    let lost = energy(&|at| wide(w[at]) - wide(near[at]));
    let expected = lost / energy(&|at| wide(w[at]));
    // bf16 operands: 2^-9 per element at random signs.
    assert!(
        (found / expected - 1.0).abs() < 2e-3,
        "{found} for {expected}"
    );
}

#[test]
fn drift_is_the_sum_of_the_differences_times_the_inputs() {
    cross_of::<f16>();
    cross_of::<bf16>();
}

fn cross_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(7);
    for (tokens, n) in [(1, 1), (300, 127), (64, 240)] {
        let x = random.halves::<E>(tokens * n, 1.0);
        // Of the input itself, and of a narrower residual stream.
        let features = n.div_ceil(2);
        let own = random.halves::<E>(tokens * features, 1.0);
        let mut drifted = |v: &E| E::from_elem(wide(*v) * (1.0 + 0.3 * random.normal()));
        let dense: Vec<E> = x.iter().map(&mut drifted).collect();
        let dense_own: Vec<E> = own.iter().map(&mut drifted).collect();
        for (dense, own, m) in [(&dense, &x, n), (&dense_own, &own, features)] {
            let found = cross_add(
                gram_zeros([m, n], &device).unwrap(),
                [dense, own].map(|it| tensor(it, [tokens, m], &device)),
                tensor(&x, [tokens, n], &device),
            );
            let mut expected = vec![0.0; m * n];
            let states = dense.chunks_exact(m).zip(own.chunks_exact(m));
            for ((dense, own), x) in states.zip(x.chunks_exact(n)) {
                for (i, row) in expected.chunks_exact_mut(n).enumerate() {
                    let difference = wide(dense[i]) - wide(own[i]);
                    for (sum, x) in row.iter_mut().zip(x) {
                        *sum += difference * wide(*x);
                    }
                }
            }
            // The difference is rounded once; the sums' own errors are far below.
            let found = distance(&values(found.unwrap()), &expected);
            assert!(found < rounding::<E>(), "{tokens} x {n} of {m}: {found}");
        }
    }
}

#[test]
fn inputs_of_two_types_are_refused() {
    let Some(device) = device() else { return };
    let x = tensor(&[f16::ONE; 64], [2, 32], &device);
    let w = tensor(&[bf16::ONE; 64], [2, 32], &device);
    assert!(linear(x.clone(), w.clone()).is_err());
    let cross = gram_zeros([32, 32], &device).unwrap();
    assert!(cross_add(cross, [w, x.clone()], x).is_err());
}
