//! Causal attention from matrix products, a block of queries at a time.
//!
//! `softmax(q kᵀ / sqrt(d)) v` with keys after the query masked out, and those before its window where it has
//! one ([`Scores`]). A block of queries only ever meets the keys that one of them sees, which skips nearly
//! half of the work or more and keeps the score matrix `[heads, block, keys]` small.

use burn::tensor::backend::Backend;
use burn::tensor::{Bool, DType, Tensor, activation::softmax};

use crate::Scores;

/// Queries per block: large enough for the products, small enough that the masked triangle inside
/// a block is little waste.
pub(crate) const BLOCK: usize = 256;

/// See [`Engine::causal_attention`](crate::Engine::causal_attention).
pub(crate) fn causal_attention<B: Backend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    scores: Scores,
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
    let q = split(q, shared).mul_scalar(scores.scale(dim));
    let k = split(k, 1).swap_dims(2, 3);
    let v = split(v, 1);

    let mut blocks = Vec::with_capacity(seq.div_ceil(BLOCK));
    for start in (0..seq).step_by(BLOCK) {
        let end = (start + BLOCK).min(seq);
        let first = scores.first_key(start);
        let products = q
            .clone()
            .slice([0..windows * kv_heads, 0..shared, start..end])
            .matmul(
                k.clone()
                    .slice([0..windows * kv_heads, 0..1, 0..dim, first..end]),
            );
        let products = capped(products.cast(DType::F32), scores);
        let products = masked(products, [start, first], scores, &device);
        let weights = softmax(products, 3).cast(dtype);
        blocks.push(weights.matmul(v.clone().slice([0..windows * kv_heads, 0..1, first..end])));
    }
    Tensor::cat(blocks, 2)
        .reshape([windows, heads, seq, dim])
        .swap_dims(1, 2)
        .reshape([windows, seq, heads * dim])
}

fn capped<B: Backend, const D: usize>(products: Tensor<B, D>, scores: Scores) -> Tensor<B, D> {
    match scores.softcap {
        None => products,
        Some(cap) => products.div_scalar(cap).tanh().mul_scalar(cap),
    }
}

/// Hides keys from queries: in `[.., queries, keys]`, of queries from position `start` and keys from `first`.
pub(crate) fn masked<B: Backend>(
    products: Tensor<B, 4>,
    [start, first]: [usize; 2],
    scores: Scores,
    device: &B::Device,
) -> Tensor<B, 4> {
    let [_, _, queries, keys] = products.dims();
    // Query i and key j are at start + i and first + j; the key must not come after the query.
    let diagonal = (start - first) as i64;
    let later = Tensor::<B, 2, Bool>::tril_mask([queries, keys], diagonal, device);
    let products = products.mask_fill(later.unsqueeze(), f32::NEG_INFINITY);
    match scores.window {
        // No query of these is at or past the window's length from the first key.
        Some(window) if start + queries > first + window => {
            let diagonal = diagonal + 1 - window as i64;
            let before = Tensor::<B, 2, Bool>::triu_mask([queries, keys], diagonal, device);
            products.mask_fill(before.unsqueeze(), f32::NEG_INFINITY)
        }
        _ => products,
    }
}

/// See [`Engine::cached_attention`](crate::Engine::cached_attention). Query heads that share a key head
/// are rows of one product with it, so that nothing of the cache is copied.
pub(crate) fn cached_attention<B: Backend>(
    q: Tensor<B, 4>,
    keys: Tensor<B, 3>,
    values: Tensor<B, 3>,
    start: usize,
    scores: Scores,
) -> Tensor<B, 3> {
    let [_, n, heads, dim] = q.dims();
    let kv_heads = keys.dims()[0];
    let shared = heads / kv_heads;
    let (device, dtype) = (q.device(), q.dtype());
    let q = q.mul_scalar(scores.scale(dim));
    let mut blocks = Vec::with_capacity(n.div_ceil(BLOCK));
    for begin in (0..n).step_by(BLOCK) {
        let block = BLOCK.min(n - begin);
        let end = start + begin + block;
        let first = scores.first_key(start + begin);
        let keys_seen = end - first;
        let q = q
            .clone()
            .slice([0..1, begin..begin + block])
            .swap_dims(1, 2)
            .reshape([kv_heads, shared * block, dim]);
        let past = |x: &Tensor<B, 3>| x.clone().slice([0..kv_heads, first..end]);
        let products = q.matmul(past(&keys).swap_dims(1, 2)).cast(DType::F32);
        let mut products = capped(products, scores);
        if block > 1 {
            let split = products.reshape([kv_heads, shared, block, keys_seen]);
            products = masked(split, [start + begin, first], scores, &device).reshape([
                kv_heads,
                shared * block,
                keys_seen,
            ]);
        }
        let weights = softmax(products, 2).cast(dtype);
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
pub fn append<B: Backend>(held: &mut Tensor<B, 3>, new: Tensor<B, 4>, at: usize) {
    let [_, n, kv_heads, dim] = new.dims();
    let new = new.squeeze_dim::<3>(0).swap_dims(0, 1);
    // With a single owner the assignment is in place.
    let nothing = Tensor::empty([1, 1, 1], (&new.device(), DType::F32));
    let old = std::mem::replace(held, nothing);
    *held = old.slice_assign([0..kv_heads, at..at + n, 0..dim], new);
}
