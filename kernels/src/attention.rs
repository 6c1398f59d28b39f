//! Causal attention from matrix products, a block of queries at a time.
//!
//! `softmax(q kᵀ / sqrt(d)) v` with keys after the query masked out. A block of queries only ever
//! meets the keys before its end, which skips nearly half of the work and keeps the score matrix
//! `[heads, block, keys]` small.

use burn::tensor::{Bool, DType, Tensor, activation::softmax};

use crate::Engine;

/// Queries per block: large enough for the products, small enough that the masked triangle inside
/// a block is little waste.
const BLOCK: usize = 256;

/// See [`Engine::causal_attention`].
pub(crate) fn causal_attention<B: Engine>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
) -> Tensor<B, 3> {
    let [windows, seq, heads, dim] = q.dims();
    let kv_heads = k.dims()[2];
    assert_eq!(k.dims(), v.dims(), "keys and values pair up");
    assert!(
        heads.is_multiple_of(kv_heads),
        "whole groups of query heads"
    );
    let shared = heads / kv_heads;
    let device = q.device();
    let dtype = q.dtype();

    // [windows, seq, heads, dim] -> [windows * kv_heads, shared, seq, dim]; query heads that share
    // a key head become a broadcast dimension, so keys are never copied.
    let split = |x: Tensor<B, 4>, per: usize| {
        x.swap_dims(1, 2)
            .reshape([windows * kv_heads, per, seq, dim])
    };
    let q = split(q, shared).mul_scalar(1.0 / (dim as f64).sqrt());
    let k = split(k, 1).swap_dims(2, 3);
    let v = split(v, 1);

    let mut blocks = Vec::with_capacity(seq.div_ceil(BLOCK));
    for start in (0..seq).step_by(BLOCK) {
        let end = (start + BLOCK).min(seq);
        let scores = q
            .clone()
            .slice([0..windows * kv_heads, 0..shared, start..end])
            .matmul(
                k.clone()
                    .slice([0..windows * kv_heads, 0..1, 0..dim, 0..end]),
            );
        // Key j is hidden from query i when j > start + i.
        let hidden = Tensor::<B, 2, Bool>::tril_mask([end - start, end], start as i64, &device);
        let scores = scores
            .cast(DType::F32)
            .mask_fill(hidden.unsqueeze(), f32::NEG_INFINITY);
        let weights = softmax(scores, 3).cast(dtype);
        blocks.push(weights.matmul(v.clone().slice([0..windows * kv_heads, 0..1, 0..end])));
    }
    Tensor::cat(blocks, 2)
        .reshape([windows, heads, seq, dim])
        .swap_dims(1, 2)
        .reshape([windows, seq, heads * dim])
}

/// See [`Engine::cached_attention`]. Query heads that share a key head are rows of one product with
/// it, so that nothing of the cache is copied.
pub(crate) fn cached_attention<B: Engine>(
    q: Tensor<B, 4>,
    keys: Tensor<B, 3>,
    values: Tensor<B, 3>,
    start: usize,
) -> Tensor<B, 3> {
    let [_, n, heads, dim] = q.dims();
    let kv_heads = keys.dims()[0];
    let shared = heads / kv_heads;
    let (device, dtype) = (q.device(), q.dtype());
    let q = q.mul_scalar(1.0 / (dim as f64).sqrt());
    let mut blocks = Vec::with_capacity(n.div_ceil(BLOCK));
    for first in (0..n).step_by(BLOCK) {
        let block = BLOCK.min(n - first);
        let end = start + first + block;
        let q = q
            .clone()
            .slice([0..1, first..first + block])
            .swap_dims(1, 2)
            .reshape([kv_heads, shared * block, dim]);
        let past = |x: &Tensor<B, 3>| x.clone().slice([0..kv_heads, 0..end]);
        let mut scores = q.matmul(past(&keys).swap_dims(1, 2)).cast(DType::F32);
        if block > 1 {
            // Key j is hidden from query i when j > start + first + i.
            let diagonal = (start + first) as i64;
            let hidden = Tensor::<B, 2, Bool>::tril_mask([block, end], diagonal, &device);
            scores = scores
                .reshape([kv_heads, shared, block, end])
                .mask_fill(hidden.unsqueeze(), f32::NEG_INFINITY)
                .reshape([kv_heads, shared * block, end]);
        }
        let weights = softmax(scores, 2).cast(dtype);
        blocks.push(
            weights
                .matmul(past(&values))
                .reshape([1, heads, block, dim]),
        );
    }
    Tensor::cat(blocks, 2)
        .swap_dims(1, 2)
        .reshape([1, n, heads * dim])
}

/// Writes keys or values `new [1, n, kv_heads, dim]` to the rows from `at` of a cache `[kv_heads, capacity,
/// dim]`.
pub fn append<B: Engine>(held: &mut Tensor<B, 3>, new: Tensor<B, 4>, at: usize) {
    let [_, n, kv_heads, dim] = new.dims();
    let new = new.squeeze_dim::<3>(0).swap_dims(0, 1);
    // With a single owner the assignment is in place.
    let nothing = Tensor::empty([1, 1, 1], (&new.device(), DType::F32));
    let old = std::mem::replace(held, nothing);
    *held = old.slice_assign([0..kv_heads, at..at + n, 0..dim], new);
}

/// See [`Engine::attend_next`].
pub(crate) fn attend_next<B: Engine>(
    [q, k, v]: [Tensor<B, 4>; 3],
    [cos, sin]: [Tensor<B, 2>; 2],
    keys: &mut Tensor<B, 3>,
    values: &mut Tensor<B, 3>,
    at: usize,
) -> Tensor<B, 3> {
    let q = B::rotary(q, cos.clone(), sin.clone());
    append(keys, B::rotary(k, cos, sin), at);
    append(values, v, at);
    B::cached_attention(q, keys.clone(), values.clone(), at)
}
