//! Key-value cache of a block for generation.

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, Scores, append};
use gptq_spec::BlockSpec;

/// Tokens by which a cache grows.
const GROWTH: usize = 256;

/// The rotated keys and the values of one block, for one conversation.
#[derive(Debug)]
pub struct Cache<B: Engine> {
    /// `[kv_heads, capacity, dim]`: the rows of a head are contiguous.
    keys: Tensor<B, 3>,
    values: Tensor<B, 3>,
    len: usize,
}

impl<B: Engine> Cache<B> {
    /// Makes an empty cache for the attention of `block`, with keys and values of this dtype.
    pub fn new(block: &BlockSpec, dtype: DType, device: &B::Device) -> Self {
        let attention = block.attention().expect("every block attends");
        let shape = [attention.kv_heads, GROWTH, attention.how.head_dim];
        let empty = || Tensor::zeros(shape, (device, dtype));
        Cache {
            keys: empty(),
            values: empty(),
            len: 0,
        }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns true if it holds no tokens.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops all tokens after the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Adds the rotated keys and the values `[1, n, kv_heads, dim]` of `n` tokens.
    pub(crate) fn push(&mut self, k: Tensor<B, 4>, v: Tensor<B, 4>) {
        let n = k.dims()[1];
        self.make_room(n);
        append(&mut self.keys, k, self.len);
        append(&mut self.values, v, self.len);
        self.len += n;
    }

    /// Adds one token and returns its attention, `[1, 1, heads * dim]`, given unrotated `q`, `k`
    /// and `v` `[1, 1, heads, dim]` and the `tables` of cosines and sines of its position.
    pub(crate) fn attend_next(
        &mut self,
        qkv: [Tensor<B, 4>; 3],
        tables: [Tensor<B, 2>; 2],
        scores: Scores,
    ) -> Tensor<B, 3> {
        self.make_room(1);
        let (keys, values) = (&mut self.keys, &mut self.values);
        let attended = B::attend_next(qkv, tables, keys, values, self.len, scores);
        self.len += 1;
        attended
    }

    /// Takes in one more token, whose key and value are to be written after the others: the keys and values to write to.
    pub(crate) fn next(&mut self) -> [Tensor<B, 3>; 2] {
        self.make_room(1);
        self.len += 1;
        [self.keys(), self.values()]
    }

    /// Makes space for `n` more tokens.
    fn make_room(&mut self, n: usize) {
        let [heads, capacity, dim] = self.keys.dims();
        let end = self.len + n;
        if end <= capacity {
            return;
        }
        let extra = end.next_multiple_of(GROWTH) - capacity;
        for held in [&mut self.keys, &mut self.values] {
            let zeros = Tensor::zeros([heads, extra, dim], (&held.device(), held.dtype()));
            *held = Tensor::cat(vec![held.clone(), zeros], 1);
        }
    }

    /// Returns the keys, `[kv_heads, capacity, dim]`, with the first [`Cache::len`] rows of a head
    /// filled.
    pub(crate) fn keys(&self) -> Tensor<B, 3> {
        self.keys.clone()
    }

    /// Returns the values, with the layout of [`Cache::keys`].
    pub(crate) fn values(&self) -> Tensor<B, 3> {
        self.values.clone()
    }
}
