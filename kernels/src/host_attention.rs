//! Causal attention on the CPU, on slices.
//!
//! A block of queries of one head meets the keys that one of them sees: two products by the crate `gemm` on the tensors as
//! they lie, `[windows, seq, heads, dim]`, and between them a softmax that reads and writes what a query sees alone.
//! Blocks are computed side by side, and none is split, so that bits do not depend on the number of threads.

use burn::tensor::{Tensor, TensorData};
use gemm::{Parallelism, gemm};
use rayon::prelude::*;

use crate::host_floats::{Floats, softmax};
use crate::{Cpu, Scores};

/// Queries per block: large enough for the products, small enough that the hidden triangle inside a block is little waste.
const BLOCK: usize = 128;

/// See [`Engine::causal_attention`](crate::Engine::causal_attention); f32.
pub(crate) fn causal_attention(
    q: Tensor<Cpu, 4>,
    k: Tensor<Cpu, 4>,
    v: Tensor<Cpu, 4>,
    scores: Scores,
) -> Tensor<Cpu, 3> {
    let [windows, seq, heads, dim] = q.dims();
    let kv_heads = k.dims()[2];
    assert_eq!(k.dims(), v.dims(), "keys and values pair up");
    assert!(
        heads.is_multiple_of(kv_heads),
        "whole groups of query heads"
    );
    let device = q.device();
    let [q, k, v] = [q, k, v].map(Floats::of);
    let inputs = AttentionInputs {
        qkv: [&q, &k, &v].map(Floats::values),
        seq,
        heads,
        kv_heads,
        dim,
        scores,
    };
    let row = heads * dim;
    let mut out = vec![0.0_f32; windows * seq * row];
    let blocks: Vec<_> = out
        .chunks_mut((seq * row).max(1))
        .enumerate()
        .flat_map(|(window, out)| {
            let blocks = out.chunks_mut(BLOCK * row).enumerate();
            blocks.map(move |(block, out)| (window, block * BLOCK, out))
        })
        .collect();
    blocks
        .into_par_iter()
        .for_each_init(Vec::new, |products, (window, start, out)| {
            for head in 0..heads {
                inputs.attend([window, head, start], products, out);
            }
        });
    Tensor::from_data(TensorData::new(out, [windows, seq, row]), &device)
}

/// Queries `[windows, seq, heads, dim]`, and keys and values `[windows, seq, kv_heads, dim]`.
#[derive(Clone, Copy)]
struct AttentionInputs<'a> {
    qkv: [&'a [f32]; 3],
    seq: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    scores: Scores,
}

impl AttentionInputs<'_> {
    /// Attention of a head of a window, for the queries from `start` on that `out [queries, heads, dim]` has rows for;
    /// `products` is memory to be used.
    fn attend(&self, [window, head, start]: [usize; 3], products: &mut Vec<f32>, out: &mut [f32]) {
        let AttentionInputs {
            seq,
            heads,
            kv_heads,
            dim,
            scores,
            ..
        } = *self;
        let (pitch, kv_pitch) = (heads * dim, kv_heads * dim);
        let queries = out.len() / pitch;
        let first = scores.first_key(start);
        let keys = start + queries - first;
        let kv_head = head / (heads / kv_heads);
        let q = &self.qkv[0][(window * seq + start) * pitch + head * dim..];
        let kv_start = (window * seq + first) * kv_pitch + kv_head * dim;
        let [k, v] = [1, 2].map(|at| &self.qkv[at][kv_start..]);
        products.resize(queries * keys, 0.0);
        assert!(q.len() >= (queries - 1) * pitch + dim && k.len() >= (keys - 1) * kv_pitch + dim);
        // SAFETY: rows of `dim` at their pitches lie in the slices, which was just checked (values lie as keys do), and
        // `products` has as many elements as its rows.
        unsafe {
            gemm(
                queries,
                keys,
                dim,
                products.as_mut_ptr(),
                1,
                keys as isize,
                false,
                q.as_ptr(),
                1,
                pitch as isize,
                k.as_ptr(),
                kv_pitch as isize,
                1,
                0.0,
                scores.scale(dim) as f32,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
        let mut factors = [0.0_f32; BLOCK];
        for (at, row) in products.chunks_exact_mut(keys).enumerate() {
            let position = start + at;
            let (before, rest) = row.split_at_mut(scores.first_key(position) - first);
            let (seen, later) = rest.split_at_mut(position + 1 - first - before.len());
            before.fill(0.0);
            later.fill(0.0);
            if let Some(cap) = scores.softcap {
                let cap = cap as f32;
                seen.iter_mut()
                    .for_each(|it| *it = cap * (*it / cap).tanh());
            }
            factors[at] = softmax(seen).recip();
        }
        let out = &mut out[head * dim..];
        // SAFETY: as above; the rows of the head in `out` are `dim` long and end with it at the latest.
        unsafe {
            gemm(
                queries,
                dim,
                keys,
                out.as_mut_ptr(),
                1,
                pitch as isize,
                false,
                products.as_ptr(),
                1,
                keys as isize,
                v.as_ptr(),
                1,
                kv_pitch as isize,
                0.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
        for (row, factor) in out.chunks_mut(pitch).zip(factors) {
            row[..dim].iter_mut().for_each(|it| *it *= factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention;

    fn random(shape: [usize; 4], seed: u64) -> Tensor<Cpu, 4> {
        use rand::{Rng, SeedableRng};
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| rng.random_range(-2.0..2.0))
            .collect();
        Tensor::from_data(TensorData::new(values, shape), &Default::default())
    }

    /// The largest distance from the attention that any backend has.
    fn distance(shape: [usize; 5], scores: Scores) -> f32 {
        let [windows, seq, heads, kv_heads, dim] = shape;
        let q = random([windows, seq, heads, dim], 1);
        let [k, v] = [2, 3].map(|seed| random([windows, seq, kv_heads, dim], seed));
        let expected = attention::causal_attention(q.clone(), k.clone(), v.clone(), scores);
        let found = causal_attention(q, k, v, scores);
        assert_eq!(found.dims(), [windows, seq, heads * dim]);
        let distance = (found - expected).abs().max().into_scalar();
        assert!(distance.is_finite());
        distance
    }

    #[test]
    fn attention_on_slices_is_the_same_for_whole_and_partial_blocks_and_grouped_heads() {
        for shape in [
            [2, 1, 2, 1, 16],
            [1, 127, 4, 2, 16],
            [2, 128, 2, 2, 32],
            [1, 129, 6, 2, 8],
            [2, 300, 4, 1, 24],
        ] {
            let distance = distance(shape, Scores::default());
            // Sums of some hundred products of numbers up to 2, in f32.
            assert!(distance < 2e-6, "{shape:?}: {distance}");
        }
    }

    #[test]
    fn attention_on_slices_has_windows_scales_and_bounds() {
        for window in [1, 7, 128, 200, 1000] {
            let scores = Scores {
                scale: Some(0.5),
                softcap: Some(3.0),
                window: Some(window),
            };
            let distance = distance([2, 300, 4, 2, 16], scores);
            assert!(distance < 4e-6, "{window}: {distance}");
        }
    }

    #[test]
    fn strided_queries_are_taken_as_they_are() {
        let q = random([1, 4, 60, 8], 5);
        let k = random([1, 60, 4, 8], 6);
        let turned = q.clone().swap_dims(1, 2);
        let copied = Tensor::from_data(turned.clone().into_data(), &Default::default());
        let scores = Scores::default();
        let found = causal_attention(turned, k.clone(), k.clone(), scores);
        let expected = causal_attention(copied, k.clone(), k, scores);
        assert_eq!(found.into_data(), expected.into_data());
    }
}
