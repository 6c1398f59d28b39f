//! Attention of one token over a cache, compared with softmax in f64.

use burn::tensor::{Element, Tensor};
use half::{bf16, f16};

use super::model::attend;
use crate::Scores;
use crate::cuda::{
    Cuda, attend_next,
    testing::{Random, device, distance, rounding, tensor, tensor_f32, values, wide},
};

#[test]
fn a_token_joins_the_cache_rotated_and_attends_to_all_of_it() {
    joins::<f16>(Scores::default());
    joins::<bf16>(Scores::default());
}

/// One token after caches of several lengths, against softmax in f64.
pub(super) fn joins<E: Element>(how: Scores) {
    let Some(device) = device() else { return };
    let mut random = Random(81);
    for [heads, kv_heads, dim, capacity, at] in [
        [1, 1, 64, 1, 0],
        [2, 1, 128, 256, 1],
        [4, 4, 64, 256, 17],
        [8, 2, 128, 256, 255],
        [6, 2, 256, 300, 130],
        [32, 8, 128, 4352, 4203],
    ] {
        let mut halves = |count| random.halves::<E>(count, 1.5);
        let (q, k, v) = (
            halves(heads * dim),
            halves(kv_heads * dim),
            halves(kv_heads * dim),
        );
        // Rows beyond the cache's length are not read.
        let mut filled = || {
            let mut rows = halves(kv_heads * capacity * dim);
            for row in rows
                .chunks_mut(dim)
                .enumerate()
                .filter(|(row, _)| row % capacity >= at)
            {
                row.1.fill(E::from_elem(f64::NAN));
            }
            rows
        };
        let (keys, vals) = (filled(), filled());
        let half = dim / 2;
        let angle = |d: usize| at as f64 * 1e4_f64.powf(-(d as f64) / half as f64);
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (0..half).map(|d| f(angle(d)) as f32).collect();
            tensor_f32(&values, [1, half], &device)
        };
        let cache = |rows: &[E]| tensor(rows, [kv_heads, capacity, dim], &device);
        let (mut held_keys, mut held_values) = (cache(&keys), cache(&vals));
        let found = attend_next(
            [
                tensor(&q, [1, 1, heads, dim], &device),
                tensor(&k, [1, 1, kv_heads, dim], &device),
                tensor(&v, [1, 1, kv_heads, dim], &device),
            ],
            [table(f64::cos), table(f64::sin)],
            &mut held_keys,
            &mut held_values,
            at,
            how,
        );
        let rotated = |x: &[E]| -> Vec<f64> {
            let turned = (0..x.len()).map(|i| {
                let (head, d) = (i / dim, i % dim);
                let other = wide(x[head * dim + (d + half) % dim]);
                let sign = if d < half { -1.0 } else { 1.0 };
                let angle = angle(d % half);
                wide(x[i]) * angle.cos() + sign * other * angle.sin()
            });
            turned.collect()
        };
        // The caches keep their rows and gain one per head.
        let with = |rows: &[E], new: &[f64]| {
            let mut rows: Vec<f64> = rows.iter().map(|x| wide(*x)).collect();
            for head in 0..kv_heads {
                let to = (head * capacity + at) * dim;
                rows[to..to + dim].copy_from_slice(&new[head * dim..][..dim]);
            }
            rows
        };
        let new: Vec<f64> = v.iter().map(|v| wide(*v)).collect();
        let (keys, vals) = (with(&keys, &rotated(&k)), with(&vals, &new));
        let filled = |rows: Vec<f64>| -> Vec<f64> {
            let rows = rows.chunks(dim).enumerate();
            let filled = rows.filter(|(row, _)| row % capacity <= at);
            filled.flat_map(|(_, row)| row.to_vec()).collect()
        };
        let label = format!("{heads}/{kv_heads} heads of {dim}, row {at} of {capacity}, {how:?}");
        let held = |x: Tensor<Cuda, 3>| filled(values(x));
        let off = distance(&held(held_keys), &filled(keys.clone()));
        assert!(off < rounding::<E>(), "{label}: keys {off}");
        assert_eq!(held(held_values), filled(vals.clone()), "{label}");

        let query = rotated(&q);
        let expected: Vec<f64> = (0..heads)
            .flat_map(|head| {
                let kv_head = head / (heads / kv_heads);
                let rows = |all: &'_ [f64]| -> Vec<Vec<f64>> {
                    let all = &all[kv_head * capacity * dim..];
                    all.chunks(dim).take(at + 1).map(<[f64]>::to_vec).collect()
                };
                let (keys, vals) = (rows(&keys), rows(&vals));
                let keys: Vec<&[f64]> = keys.iter().map(Vec::as_slice).collect();
                let vals: Vec<&[f64]> = vals.iter().map(Vec::as_slice).collect();
                attend(&query[head * dim..][..dim], &keys, &vals, how)
            })
            .collect();
        // The rotated query and key are rounded, which changes each product in a score by up to two
        // roundings, and the output is rounded once more.
        let off = distance(&values(found.unwrap()), &expected);
        assert!(off < 40.0 * rounding::<E>(), "{label}: {off}");
    }
}

#[test]
fn a_full_cache_is_refused() {
    let Some(device) = device() else { return };
    let zeros =
        |heads, dim: usize| tensor(&vec![f16::ZERO; heads * dim], [1, 1, heads, dim], &device);
    let cache = || tensor(&[f16::ZERO; 128], [1, 2, 64], &device);
    let table = || tensor_f32(&[0.0; 32], [1, 32], &device);
    let found = attend_next(
        [zeros(1, 64), zeros(1, 64), zeros(1, 64)],
        [table(), table()],
        &mut cache(),
        &mut cache(),
        2,
        Scores::default(),
    );
    assert!(found.is_err());
}

#[test]
fn a_cache_that_somebody_else_holds_keeps_its_rows() {
    let Some(device) = device() else { return };
    let mut random = Random(83);
    let [heads, dim, capacity, at] = [2, 64, 8, 3];
    let mut halves = |count| random.halves::<f16>(count, 1.0);
    let rows = halves(capacity * dim);
    let new = halves(dim);
    let head = |values: &[f16], heads| tensor(values, [1, 1, heads, dim], &device);
    let q = halves(heads * dim);
    let cos = tensor_f32(&vec![1.0; dim / 2], [1, dim / 2], &device);
    let sin = tensor_f32(&vec![0.0; dim / 2], [1, dim / 2], &device);
    let cache = || tensor::<f16, 3>(&rows, [1, capacity, dim], &device);
    let (mut keys, mut held_values) = (cache(), cache());
    let other = keys.clone();
    let step = |keys: &mut Tensor<Cuda, 3>, held_values: &mut Tensor<Cuda, 3>| {
        let qkv = [head(&q, heads), head(&new, 1), head(&new, 1)];
        let tables = [cos.clone(), sin.clone()];
        attend_next(qkv, tables, keys, held_values, at, Scores::default()).unwrap();
    };
    step(&mut keys, &mut held_values);
    let before: Vec<f64> = rows.iter().map(|x| wide(*x)).collect();
    let mut after = before.clone();
    for (row, value) in after[at * dim..].iter_mut().zip(&new) {
        *row = wide(*value);
    }
    assert!(
        values(other) == before,
        "the other holder's rows were written to"
    );
    assert!(values(keys.clone()) == after && values(held_values) == after);
    drop(keys);
}
