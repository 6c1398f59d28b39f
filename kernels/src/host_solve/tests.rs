//! The default engine on the CPU backend, against plain f64 loops.

use burn::tensor::{DType, Int, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::{Cpu, Engine, Mismatch, Scores};
use gptq_format::{Bits, GroupSize};
use gptq_solver::Settings;

fn random(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<Cpu, D> {
    Tensor::from_data(
        TensorData::new(values.to_vec(), shape),
        (&Default::default(), DType::F32),
    )
}

fn values<const D: usize>(tensor: Tensor<Cpu, D>) -> Vec<f64> {
    tensor
        .into_data()
        .as_slice::<f32>()
        .unwrap()
        .iter()
        .map(|&v| f64::from(v))
        .collect()
}

fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let error = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    let size = norm(&mut expected.iter().copied());
    assert!(error <= tolerance * size, "relative error {}", error / size);
}

// f32 products of up to 300 terms, each rounded once and summed in some order: a few hundred
// half-ulps at worst (300 * 6e-8), far less on average.
const F32: f64 = 2e-6;

#[test]
fn gram_add_fills_the_upper_triangle_at_any_size() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (tokens, n) in [(1, 1), (31, 127), (300, 129), (64, 240)] {
        let (x, start) = (random(&mut rng, tokens * n), random(&mut rng, n * n));
        let gram = values(Cpu::gram_add(
            tensor(&start, [n, n]),
            tensor(&x, [tokens, n]),
        ));
        let (mut found, mut expected) = (Vec::new(), Vec::new());
        for r in 0..n {
            for c in r..n {
                let dot: f64 = (0..tokens)
                    .map(|t| f64::from(x[t * n + r]) * f64::from(x[t * n + c]))
                    .sum();
                expected.push(dot + f64::from(start[r * n + c]));
                found.push(gram[r * n + c]);
            }
        }
        assert_close(&found, &expected, F32);
    }
}

#[test]
fn causal_attention_sees_no_later_key_and_shares_key_heads() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let plain = Scores::default();
    let other = |window| Scores {
        scale: Some(0.4),
        softcap: Some(2.0),
        window: Some(window),
    };
    for (windows, seq, heads, kv_heads, dim, how) in [
        (1, 1, 2, 1, 4, plain),
        (2, 31, 4, 2, 8, plain),
        (1, 300, 2, 2, 16, plain),
        (2, 31, 4, 2, 8, other(1)),
        (1, 300, 2, 2, 16, other(7)),
        (1, 600, 1, 1, 4, other(258)),
    ] {
        let scale = how.scale.unwrap_or(1.0 / (dim as f64).sqrt());
        let q = random(&mut rng, windows * seq * heads * dim);
        let k = random(&mut rng, windows * seq * kv_heads * dim);
        let v = random(&mut rng, windows * seq * kv_heads * dim);
        let mut expected = vec![0.0; windows * seq * heads * dim];
        for (w, i, h) in (0..windows)
            .flat_map(|w| (0..seq).flat_map(move |i| (0..heads).map(move |h| (w, i, h))))
        {
            let at = |j: usize, heads: usize, h: usize| ((w * seq + j) * heads + h) * dim;
            let kv = h * kv_heads / heads;
            let scores: Vec<f64> = (0..=i)
                .map(|j| {
                    let product: f64 = (0..dim)
                        .map(|d| {
                            f64::from(q[at(i, heads, h) + d])
                                * f64::from(k[at(j, kv_heads, kv) + d])
                        })
                        .sum();
                    let score = scale * product;
                    let score = how.softcap.map_or(score, |cap| cap * (score / cap).tanh());
                    let seen = how.window.is_none_or(|window| j + window > i);
                    if seen { score.exp() } else { 0.0 }
                })
                .collect();
            let total: f64 = scores.iter().sum();
            for (j, score) in scores.iter().enumerate() {
                for d in 0..dim {
                    expected[at(i, heads, h) + d] +=
                        score / total * f64::from(v[at(j, kv_heads, kv) + d]);
                }
            }
        }
        let found = Cpu::causal_attention(
            tensor(&q, [windows, seq, heads, dim]),
            tensor(&k, [windows, seq, kv_heads, dim]),
            tensor(&v, [windows, seq, kv_heads, dim]),
            how,
        );
        assert_eq!(found.dims(), [windows, seq, heads * dim]);
        assert_close(&values(found), &expected, F32);
    }
}

#[test]
fn norm_swiglu_and_embedding_follow_their_formulas() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let (x, w) = (random(&mut rng, 7 * 33), random(&mut rng, 33));
    let found = values(Cpu::rms_norm(tensor(&x, [7, 33]), tensor(&w, [33]), 1e-5));
    let expected: Vec<f64> = x
        .chunks(33)
        .flat_map(|row| {
            let mean = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 33.0;
            row.iter()
                .zip(&w)
                .map(move |(&v, &w)| f64::from(v) / (mean + 1e-5).sqrt() * f64::from(w))
        })
        .collect();
    assert_close(&found, &expected, F32);

    let up = random(&mut rng, 7 * 33);
    let found = values(Cpu::swiglu(tensor(&x, [7, 33]), tensor(&up, [7, 33])));
    let silu = |v: f32| f64::from(v) / (1.0 + (-f64::from(v)).exp());
    let expected: Vec<f64> = x
        .iter()
        .zip(&up)
        .map(|(&g, &u)| silu(g) * f64::from(u))
        .collect();
    assert_close(&found, &expected, F32);

    let found = values(Cpu::geglu(tensor(&x, [7, 33]), tensor(&up, [7, 33])));
    let gelu = |v: f64| {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3));
        0.5 * v * (1.0 + inner.tanh())
    };
    let expected: Vec<f64> = x
        .iter()
        .zip(&up)
        .map(|(&g, &u)| gelu(f64::from(g)) * f64::from(u))
        .collect();
    assert_close(&found, &expected, F32);

    let ids = Tensor::<Cpu, 1, Int>::from_data([6, 0, 6], (&Default::default(), DType::I32));
    let rows = values(Cpu::embed(ids, tensor(&x, [7, 33])));
    assert_eq!(rows[..33], rows[66..]);
    assert_eq!(rows[33], f64::from(x[0]));
}

#[test]
fn norms_in_f32_add_to_their_weights_and_take_the_mean_off() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let (x, w) = (random(&mut rng, 7 * 33), random(&mut rng, 33));
    for (offset, centred) in [(0.0, false), (1.0, false), (0.0, true)] {
        let (rows, weight) = (tensor(&x, [7, 33]), tensor(&w, [33]));
        let found = values(match centred {
            true => Cpu::centred_norm(rows, weight, 1e-5),
            false => Cpu::rms_norm_f32(rows, weight, 1e-5, offset),
        });
        let expected: Vec<f64> = x
            .chunks(33)
            .flat_map(|row| {
                let sum: f64 = row.iter().map(|&v| f64::from(v)).sum();
                let mean = if centred { sum / 33.0 } else { 0.0 };
                let square = row.iter().map(|&v| (f64::from(v) - mean).powi(2));
                let factor = 1.0 / (square.sum::<f64>() / 33.0 + 1e-5).sqrt();
                let pairs = row.iter().zip(&w);
                pairs.map(move |(&v, &w)| (f64::from(v) - mean) * factor * (f64::from(w) + offset))
            })
            .collect();
        assert_close(&found, &expected, F32);
    }
}

#[test]
fn partial_rotations_leave_the_rest_and_may_pair_neighbours() {
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let (seq, heads, dim, half) = (5, 3, 8, 2);
    let x = random(&mut rng, seq * heads * dim);
    let angles: Vec<f32> = (0..seq * half).map(|i| i as f32 * 0.37).collect();
    let table = |f: fn(f32) -> f32| {
        let values: Vec<f32> = angles.iter().map(|&a| f(a)).collect();
        tensor(&values, [seq, half])
    };
    for interleaved in [false, true] {
        let (heads_of, cos, sin) = (
            tensor(&x, [1, seq, heads, dim]),
            table(f32::cos),
            table(f32::sin),
        );
        let found = values(match interleaved {
            true => Cpu::rotary_interleaved(heads_of, cos, sin),
            false => Cpu::rotary(heads_of, cos, sin),
        });
        let mut expected: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        for head in 0..seq * heads {
            for d in 0..half {
                let (first, second) = match interleaved {
                    true => (head * dim + 2 * d, head * dim + 2 * d + 1),
                    false => (head * dim + d, head * dim + d + half),
                };
                let (a, b) = (f64::from(x[first]), f64::from(x[second]));
                let (sin, cos) = f64::from(angles[head / heads * half + d]).sin_cos();
                expected[first] = a * cos - b * sin;
                expected[second] = b * cos + a * sin;
            }
        }
        assert_close(&found, &expected, F32);
    }
}

#[test]
fn rotary_turns_each_pair_by_its_angle() {
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let (seq, heads, dim) = (5, 3, 8);
    let x = random(&mut rng, seq * heads * dim);
    let angles: Vec<f32> = (0..seq * dim / 2).map(|i| i as f32 * 0.37).collect();
    let table = |f: fn(f32) -> f32| {
        tensor(
            &angles.iter().map(|&a| f(a)).collect::<Vec<_>>(),
            [seq, dim / 2],
        )
    };
    let found = values(Cpu::rotary(
        tensor(&x, [1, seq, heads, dim]),
        table(f32::cos),
        table(f32::sin),
    ));
    let mut expected = vec![0.0; x.len()];
    for (s, h, d) in
        (0..seq).flat_map(|s| (0..heads).flat_map(move |h| (0..dim / 2).map(move |d| (s, h, d))))
    {
        let at = (s * heads + h) * dim + d;
        let (a, b) = (f64::from(x[at]), f64::from(x[at + dim / 2]));
        let (sin, cos) = f64::from(angles[s * dim / 2 + d]).sin_cos();
        expected[at] = a * cos - b * sin;
        expected[at + dim / 2] = b * cos + a * sin;
    }
    assert_close(&found, &expected, F32);
}

#[test]
fn a_solved_subset_reports_the_error_of_what_it_returns() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let (tokens, n, out) = (400, 64, 32);
    let (x, w) = (random(&mut rng, tokens * n), random(&mut rng, out * n));
    let gram = Cpu::gram_add(
        Tensor::zeros([n, n], (&Default::default(), DType::F32)),
        tensor(&x, [tokens, n]),
    );
    let settings = Settings {
        bits: Bits::Three,
        group_size: GroupSize::Columns(32),
        sym: true,
        static_groups: false,
        scale_search: false,
        f16_scales: true,
        refine: 0,
    };
    let request = Request {
        weight: tensor(&w, [out, n]),
        settings,
        residual: None,
        keep_unrounded: false,
    };
    let hessian = HessianOptions {
        act_order: true,
        damping: 0.01,
    };
    let problem = Problem {
        gram,
        mismatch: None,
        requests: vec![request],
    };
    let subset = Cpu::solve(problem, hessian).unwrap();
    let solved = subset.solved.into_iter().next().unwrap();
    let dense = Cpu::matmul_nt(tensor(&x, [tokens, n]), tensor(&w, [out, n]));
    let quantized = Cpu::matmul_nt(tensor(&x, [tokens, n]), solved.weight.clone());
    let energy = |t: Tensor<Cpu, 2>| values(t).iter().map(|v| v * v).sum::<f64>();
    let direct = energy(dense.clone() - quantized) / energy(dense);
    assert!(
        (solved.relative_error / direct - 1.0).abs() < 1e-3,
        "{} {direct}",
        solved.relative_error
    );
    assert!(solved.relative_error < solved.rtn_error);
    let unpacked = Cpu::dequantize_packed(
        &Cpu::pack(solved.codes).wait(),
        DType::F32,
        &Default::default(),
    );
    assert_eq!(values(unpacked), values(solved.weight.clone()));
    assert_eq!((subset.damping, subset.dead_columns), (0.01, 0));
}

#[test]
fn a_solve_of_some_strips_gives_the_rows_and_sums_of_a_solve_of_all() {
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let strip = Cpu::STRIP.expect("the host solves strip by strip");
    let (tokens, n, out) = (200, 96, 2 * strip + 32);
    let x = random(&mut rng, tokens * n);
    let zeros = |rows| Cpu::gram_zeros([rows, n], &Default::default());
    let gram = Cpu::gram_add(zeros(n), tensor(&x, [tokens, n]));
    let off = |rng: &mut ChaCha8Rng, rows: usize| {
        let pair = [0, 1].map(|_| tensor(&random(rng, tokens * rows), [tokens, rows]));
        Cpu::cross_add(zeros(rows), pair, tensor(&x, [tokens, n]))
    };
    let (cross, residual) = (off(&mut rng, n), off(&mut rng, out));
    let weight = tensor(&random(&mut rng, out * n), [out, n]);
    let settings = Settings {
        bits: Bits::Three,
        group_size: GroupSize::Columns(32),
        sym: true,
        static_groups: true,
        scale_search: true,
        f16_scales: true,
        refine: 2,
    };
    let solve = |rows: std::ops::Range<usize>| {
        let own = |all: &Tensor<Cpu, 2>| all.clone().slice([rows.clone(), 0..n]);
        let request = Request {
            weight: own(&weight),
            settings,
            residual: Some(own(&residual)),
            keep_unrounded: true,
        };
        let mismatch = Mismatch {
            gram: gram.clone(),
            cross: cross.clone(),
            strength: 0.7,
        };
        let hessian = HessianOptions {
            act_order: true,
            damping: 0.01,
        };
        let problem = Problem {
            gram: gram.clone(),
            mismatch: Some(mismatch),
            requests: vec![request],
        };
        let subset = Cpu::solve(problem, hessian).unwrap();
        subset.solved.into_iter().next().unwrap()
    };
    let whole = solve(0..out);
    let parts = [solve(0..strip), solve(strip..out)];
    let sums: Vec<StripSums> = parts.iter().flat_map(|part| part.sums.clone()).collect();
    assert_eq!((sums.len(), &sums), (3, &whole.sums));
    let errors = SolveErrors::of(&sums, &settings, true);
    assert_eq!(errors.relative_error, whole.relative_error);
    assert_eq!(Some(errors.objective), whole.objective);
    assert_eq!(errors.gains, whole.gains);
    let rows = |of: &dyn Fn(&Solved<Cpu>) -> Tensor<Cpu, 2>| {
        let together = parts.iter().flat_map(|part| values(of(part)));
        (together.collect::<Vec<_>>(), values(of(&whole)))
    };
    for of in [
        (|it| it.weight.clone()) as fn(&Solved<Cpu>) -> Tensor<Cpu, 2>,
        |it| it.nearest.clone(),
        |it| it.unrounded.clone().unwrap(),
    ] {
        let (together, whole) = rows(&of);
        assert_eq!(together, whole);
    }
}
