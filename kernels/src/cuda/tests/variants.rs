//! Tests of the variants of operations that some families use, against f64.

use burn::tensor::{Element, Tensor};
use half::{bf16, f16};

use super::{decoding::joins, model::attention_of};
use crate::Scores;
use crate::cuda::{
    geglu, norm_f32, partial_rotary,
    testing::{Random, device, distance, rounding, tensor, tensor_f32, values, wide},
};

fn window(window: usize) -> Scores {
    Scores {
        window: Some(window),
        ..Scores::default()
    }
}

#[test]
fn attention_sees_the_last_keys_of_a_window_alone() {
    // Around the ends of tiles of keys (64) and of rows (128), and longer than the text.
    for sees in [1, 15, 63, 64, 65, 128, 200, 299, 300, 1000] {
        attention_of::<f16>([2, 300, 2, 1, 64], window(sees));
        attention_of::<bf16>([1, 300, 2, 2, 128], window(sees));
        attention_of::<f16>([1, 300, 1, 1, 256], window(sees));
    }
}

#[test]
fn attention_has_another_scale_and_bounded_scores() {
    for how in [
        Scores {
            scale: Some(0.31),
            ..Scores::default()
        },
        Scores {
            softcap: Some(3.0),
            ..Scores::default()
        },
        Scores {
            scale: Some(0.2),
            softcap: Some(5.0),
            window: Some(70),
        },
    ] {
        attention_of::<f16>([1, 200, 4, 2, 32], how);
        attention_of::<bf16>([2, 130, 2, 1, 128], how);
        attention_of::<f16>([1, 140, 2, 1, 256], how);
    }
}

#[test]
fn a_token_attends_to_a_window_of_the_cache_with_bounded_scores() {
    for how in [
        window(1),
        window(16),
        window(300),
        Scores {
            softcap: Some(5.0),
            ..Scores::default()
        },
        Scores {
            scale: Some(0.05),
            softcap: Some(4.0),
            window: Some(100),
        },
    ] {
        joins::<f16>(how);
        joins::<bf16>(how);
    }
}

#[test]
fn norms_in_f32_add_to_their_weights_and_take_the_mean_off() {
    norms::<f16>();
    norms::<bf16>();
}

fn norms<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(91);
    for (offset, centred) in [(0.0, false), (1.0, false), (0.0, true)] {
        for (tokens, hidden) in [(1, 2), (3, 31), (5, 127), (2, 240), (7, 4096)] {
            let mut x = random.halves::<E>(tokens * hidden, 3.0);
            // Off the middle.
            x.iter_mut().for_each(|x| *x = E::from_elem(wide(*x) + 1.0));
            let w = random.halves::<E>(hidden, 1.0);
            let found = norm_f32(
                tensor(&x, [tokens, hidden], &device),
                tensor(&w, [hidden], &device),
                1e-5,
                offset,
                centred,
            );
            let expected: Vec<f64> = x
                .chunks_exact(hidden)
                .flat_map(|row| {
                    let sum: f64 = row.iter().map(|v| wide(*v)).sum();
                    let mean = if centred { sum / hidden as f64 } else { 0.0 };
                    let square: f64 = row.iter().map(|v| (wide(*v) - mean).powi(2)).sum();
                    let factor = 1.0 / (square / hidden as f64 + 1e-5).sqrt();
                    let pairs = row.iter().zip(&w);
                    let scaled =
                        pairs.map(|(v, w)| (wide(*v) - mean) * factor * (wide(*w) + offset));
                    scaled.collect::<Vec<_>>()
                })
                .collect();
            let off = distance(&values(found.unwrap()), &expected);
            let label = format!("{tokens} x {hidden}, {offset}, {centred}");
            assert!(off < rounding::<E>(), "{label}: {off}");
        }
    }
}

#[test]
fn geglu_is_gelu_of_the_gate_times_up() {
    geglu_of::<f16>();
    geglu_of::<bf16>();
}

fn geglu_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(92);
    for (tokens, width) in [(1, 1), (31, 127), (3, 240)] {
        let gate = random.halves::<E>(tokens * width, 4.0);
        let up = random.halves::<E>(tokens * width, 1.0);
        let found = geglu(
            tensor(&gate, [tokens, width], &device),
            tensor(&up, [tokens, width], &device),
        );
        let gelu = |x: f64| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        };
        let pairs = gate.iter().zip(&up);
        let expected: Vec<f64> = pairs.map(|(g, u)| gelu(wide(*g)) * wide(*u)).collect();
        let off = distance(&values(found.unwrap()), &expected);
        assert!(off < rounding::<E>(), "{tokens} x {width}: {off}");
    }
}

#[test]
fn partial_rotations_leave_the_rest_and_may_pair_neighbours() {
    rotations::<f16>();
    rotations::<bf16>();
}

fn rotations<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(93);
    for [windows, seq, heads, dim, half] in [
        [1, 1, 1, 2, 1],
        [2, 31, 3, 32, 12],
        [1, 127, 2, 128, 32],
        [1, 33, 2, 64, 32],
    ] {
        let x = random.halves::<E>(windows * seq * heads * dim, 1.0);
        let angle = |s: usize, d: usize| s as f64 * 1e4_f64.powf(-(d as f64) / half as f64);
        let table = |f: fn(f64) -> f64| {
            let all = (0..seq * half).map(|at| f(angle(at / half, at % half)) as f32);
            tensor_f32(&all.collect::<Vec<_>>(), [seq, half], &device)
        };
        for interleaved in [false, true] {
            let found = partial_rotary(
                tensor(&x, [windows, seq, heads, dim], &device),
                table(f64::cos),
                table(f64::sin),
                interleaved,
            );
            let one = |at: usize| {
                let (head, d) = (at / dim, at % dim);
                if d >= 2 * half {
                    return wide(x[at]);
                }
                let (pair, first, other) = match interleaved {
                    true => (d / 2, d % 2 == 0, d ^ 1),
                    false => (d % half, d < half, (d + half) % (2 * half)),
                };
                let angle = angle(head / heads % seq, pair);
                let sign = if first { -1.0 } else { 1.0 };
                wide(x[at]) * angle.cos() + sign * wide(x[head * dim + other]) * angle.sin()
            };
            let expected: Vec<f64> = (0..x.len()).map(one).collect();
            let found: Tensor<_, 4> = found.unwrap();
            let off = distance(&values(found), &expected);
            let label = format!("{windows} {seq} {heads} {dim} {half} {interleaved}");
            assert!(off < rounding::<E>(), "{label}: {off}");
        }
    }
}
