//! The operations of the forward pass.

use burn::tensor::{DType, Element, Tensor, TensorData};
use half::{bf16, f16};

use crate::Scores;
use crate::cuda::{
    Cuda, causal_attention, embedding, rms_norm, rotary, swiglu,
    testing::{Random, device, distance, rounding, tensor, tensor_f32, values, wide},
};

#[test]
fn rms_norm_normalises_each_row_and_scales_it() {
    rms_norm_of::<f16>();
    rms_norm_of::<bf16>();
}

fn rms_norm_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(10);
    for (tokens, hidden) in [(1, 1), (3, 31), (5, 127), (2, 240), (7, 4096)] {
        let x = random.halves::<E>(tokens * hidden, 3.0);
        let w = random.halves::<E>(hidden, 1.0);
        let found = rms_norm(
            tensor(&x, [tokens, hidden], &device),
            tensor(&w, [hidden], &device),
            1e-5,
        );
        let expected: Vec<f64> = x
            .chunks_exact(hidden)
            .flat_map(|row| {
                let square: f64 = row.iter().map(|v| wide(*v).powi(2)).sum();
                let factor = 1.0 / (square / hidden as f64 + 1e-5).sqrt();
                row.iter()
                    .zip(&w)
                    .map(|(v, w)| wide(*v) * factor * wide(*w))
                    .collect::<Vec<_>>()
            })
            .collect();
        // Rounded twice: before and after the weight.
        let found = distance(&values(found.unwrap()), &expected);
        assert!(
            found < 2.0 * rounding::<E>(),
            "{tokens} x {hidden}: {found}"
        );
    }
}

#[test]
fn rotary_rotates_each_pair_by_its_position() {
    rotary_of::<f16>();
    rotary_of::<bf16>();
}

fn rotary_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(11);
    for [windows, seq, heads, dim] in [[1, 1, 1, 2], [2, 31, 3, 64], [1, 127, 2, 128]] {
        let half = dim / 2;
        let x = random.halves::<E>(windows * seq * heads * dim, 1.0);
        let angle = |s: usize, d: usize| s as f64 * 1e4_f64.powf(-(d as f64) / half as f64);
        let table = |f: fn(f64) -> f64| -> Vec<f32> {
            (0..seq * half)
                .map(|at| f(angle(at / half, at % half)) as f32)
                .collect()
        };
        let found = rotary(
            tensor(&x, [windows, seq, heads, dim], &device),
            tensor_f32(&table(f64::cos), [seq, half], &device),
            tensor_f32(&table(f64::sin), [seq, half], &device),
        );
        let expected: Vec<f64> = (0..x.len())
            .map(|at| {
                let (head, d) = (at / dim, at % dim);
                let angle = angle(head / heads % seq, d % half);
                let other = wide(x[head * dim + (d + half) % dim]);
                let sign = if d < half { -1.0 } else { 1.0 };
                wide(x[at]) * angle.cos() + sign * other * angle.sin()
            })
            .collect();
        let found = distance(&values(found.unwrap()), &expected);
        assert!(
            found < rounding::<E>(),
            "{windows} {seq} {heads} {dim}: {found}"
        );
    }
}

#[test]
fn swiglu_is_silu_of_the_gate_times_up() {
    swiglu_of::<f16>();
    swiglu_of::<bf16>();
}

fn swiglu_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(12);
    for (tokens, width) in [(1, 1), (31, 127), (3, 240)] {
        let gate = random.halves::<E>(tokens * width, 4.0);
        let up = random.halves::<E>(tokens * width, 1.0);
        let found = swiglu(
            tensor(&gate, [tokens, width], &device),
            tensor(&up, [tokens, width], &device),
        );
        let expected: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(g, u)| wide(*g) / (1.0 + (-wide(*g)).exp()) * wide(*u))
            .collect();
        let found = distance(&values(found.unwrap()), &expected);
        assert!(found < rounding::<E>(), "{tokens} x {width}: {found}");
    }
}

#[test]
fn embedding_gathers_rows() {
    embedding_of::<f16>();
    embedding_of::<bf16>();
}

fn embedding_of<E: Element>() {
    let Some(device) = device() else { return };
    let mut random = Random(13);
    for (tokens, vocabulary, hidden) in [(1, 1, 1), (31, 40, 127), (7, 100, 240)] {
        let table = random.halves::<E>(vocabulary * hidden, 1.0);
        let ids: Vec<i32> = (0..tokens)
            .map(|_| (random.next() % vocabulary as u64) as i32)
            .collect();
        let found = embedding(
            Tensor::from_data(
                TensorData::new(ids.clone(), [tokens]),
                (&device, DType::I32),
            ),
            tensor::<E, 2>(&table, [vocabulary, hidden], &device),
        );
        let expected: Vec<f64> = ids
            .iter()
            .flat_map(|&id| &table[id as usize * hidden..][..hidden])
            .map(|v| wide(*v))
            .collect();
        let found: Tensor<Cuda, 2> = found.unwrap();
        assert_eq!(values(found), expected);
    }
}

/// Computes softmax attention of one query row, the last of those that the keys are of, in f64.
pub(super) fn attend(q: &[f64], keys: &[&[f64]], values: &[&[f64]], how: Scores) -> Vec<f64> {
    let first = keys.len().saturating_sub(how.window.unwrap_or(keys.len()));
    let (keys, values) = (&keys[first..], &values[first..]);
    let scale = how.scale.unwrap_or((q.len() as f64).sqrt().recip());
    let scores: Vec<f64> = keys
        .iter()
        .map(|k| scale * q.iter().zip(*k).map(|(a, b)| a * b).sum::<f64>())
        .map(|score| how.softcap.map_or(score, |cap| cap * (score / cap).tanh()))
        .collect();
    let high = scores.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - high).exp()).collect();
    let total: f64 = weights.iter().sum();
    (0..q.len())
        .map(|d| {
            weights
                .iter()
                .zip(values)
                .map(|(w, v)| w * v[d])
                .sum::<f64>()
                / total
        })
        .collect()
}

#[test]
fn attention_is_the_causal_softmax_with_grouped_heads() {
    for shape in [
        [1, 1, 1, 1, 16],
        [2, 31, 4, 2, 64],
        [1, 127, 3, 1, 128],
        [2, 240, 2, 2, 80],
        [1, 300, 6, 2, 32],
        [1, 129, 1, 1, 256],
    ] {
        attention_of::<f16>(shape, Scores::default());
        attention_of::<bf16>(shape, Scores::default());
    }
}

/// Attention of `[windows, seq, heads, kv_heads, dim]` against softmax in f64.
pub(super) fn attention_of<E: Element>(shape: [usize; 5], how: Scores) {
    let Some(device) = device() else { return };
    let mut random = Random(14);
    let [windows, seq, heads, kv_heads, dim] = shape;
    let mut halves = |count, deviation| random.halves::<E>(count, deviation);
    // Sharp and flat rows: scores with a standard deviation of about 4.
    let q = halves(windows * seq * heads * dim, 2.0);
    let k = halves(windows * seq * kv_heads * dim, 2.0);
    let v = halves(windows * seq * kv_heads * dim, 1.0);
    let found = causal_attention(
        tensor(&q, [windows, seq, heads, dim], &device),
        tensor(&k, [windows, seq, kv_heads, dim], &device),
        tensor(&v, [windows, seq, kv_heads, dim], &device),
        how,
    );
    let widen = |values: &[E]| values.iter().map(|v| wide(*v)).collect::<Vec<_>>();
    let (q, k, v) = (widen(&q), widen(&k), widen(&v));
    let mut expected = Vec::new();
    for at in 0..windows * seq * heads {
        let (head, position, window) = (at % heads, at / heads % seq, at / heads / seq);
        let group = head / (heads / kv_heads);
        let rows = |values: &'_ Vec<f64>| -> Vec<Vec<f64>> {
            (0..=position)
                .map(|s| {
                    let start = ((window * seq + s) * kv_heads + group) * dim;
                    values[start..start + dim].to_vec()
                })
                .collect()
        };
        let (keys, vals) = (rows(&k), rows(&v));
        let keys: Vec<&[f64]> = keys.iter().map(Vec::as_slice).collect();
        let vals: Vec<&[f64]> = vals.iter().map(Vec::as_slice).collect();
        expected.extend(attend(&q[at * dim..][..dim], &keys, &vals, how));
    }
    // Probabilities and output are each rounded once.
    let found = distance(&values(found.unwrap()), &expected);
    assert!(
        found < 2.0 * rounding::<E>(),
        "{windows} {seq} {heads}/{kv_heads} {dim} {how:?}: {found}"
    );
}
