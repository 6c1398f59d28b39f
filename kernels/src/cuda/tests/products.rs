//! The Gram matrix and the linear layer.

use crate::cuda::{
    gram_add, gram_zeros, linear, relative_error,
    testing::{Random, device, distance, tensor, values},
};

#[test]
fn the_upper_half_of_the_gram_matrix_is_the_sum_over_two_batches() {
    let Some(device) = device() else { return };
    let mut random = Random(1);
    for (tokens, n) in [(1, 1), (17, 31), (300, 127), (64, 240), (40, 1030)] {
        let batches: Vec<_> = (0..2).map(|_| random.halves(tokens * n, 1.0)).collect();
        let mut gram = gram_zeros(n, &device).unwrap();
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
                    .map(|row| row[i].to_f64() * row[j].to_f64())
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
    let Some(device) = device() else { return };
    let mut random = Random(2);
    for (tokens, inside, out) in [(1, 1, 1), (31, 127, 240), (127, 240, 31), (5, 4096, 64)] {
        let x = random.halves(tokens * inside, 1.0);
        let w = random.halves(out * inside, 0.05);
        let y = linear(
            tensor(&x, [tokens, inside], &device),
            tensor(&w, [out, inside], &device),
        );
        let expected: Vec<f64> = x
            .chunks_exact(inside)
            .flat_map(|x| {
                w.chunks_exact(inside)
                    .map(|w| x.iter().zip(w).map(|(a, b)| a.to_f64() * b.to_f64()).sum())
                    .collect::<Vec<f64>>()
            })
            .collect();
        // The output is rounded to f16: at most 2^-11 of each element.
        let found = distance(&values(y.unwrap()), &expected);
        assert!(
            found < 2.0_f64.powi(-11),
            "{tokens} x {inside} x {out}: {found}"
        );
    }
}

#[test]
fn the_relative_error_is_that_of_the_outputs() {
    let Some(device) = device() else { return };
    let mut random = Random(3);
    let (tokens, n, out) = (400, 240, 96);
    let scales: Vec<f64> = (0..n).map(|_| (3.0 * random.normal()).exp()).collect();
    let x: Vec<_> = random
        .halves(tokens * n, 1.0)
        .iter()
        .enumerate()
        .map(|(at, v)| half::f16::from_f64(v.to_f64() * scales[at % n].min(1e3)))
        .collect();
    let w = random.halves(out * n, 0.05);
    let near: Vec<_> = w
        .iter()
        .map(|v| half::f16::from_f64(v.to_f64() + 0.002 * random.normal()))
        .collect();
    let gram = gram_add(
        gram_zeros(n, &device).unwrap(),
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
                    let y: f64 = (0..n).map(|c| x[c].to_f64() * weight(r * n + c)).sum();
                    y * y
                })
            })
            .sum()
    };
    let lost = energy(&|at| w[at].to_f64() - near[at].to_f64());
    let expected = lost / energy(&|at| w[at].to_f64());
    // bf16 operands: 2^-9 per element at random signs.
    assert!(
        (found / expected - 1.0).abs() < 2e-3,
        "{found} for {expected}"
    );
}
