//! A block's keys and values of the tokens so far, kept between steps of generation.

use burn::tensor::{DType, Tensor};
use gptq_kernels::Engine;

/// Tokens a cache grows by.
const GROWTH: usize = 256;

/// The rotated keys and the values of one block, for one conversation.
#[derive(Debug)]
pub struct Cache<B: Engine> {
    /// `[kv_heads, capacity, dim]`: the rows of a head lie together.
    keys: Tensor<B, 3>,
    values: Tensor<B, 3>,
    len: usize,
}

impl<B: Engine> Cache<B> {
    /// An empty one, for keys and values of this dtype.
    pub fn new(kv_heads: usize, dim: usize, dtype: DType, device: &B::Device) -> Self {
        let empty = || Tensor::zeros([kv_heads, GROWTH, dim], (device, dtype));
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

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens but the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Adds the keys and values `[1, n, kv_heads, dim]` of `n` tokens.
    pub(crate) fn push(&mut self, k: Tensor<B, 4>, v: Tensor<B, 4>) {
        let [_, n, kv_heads, dim] = k.dims();
        let end = self.len + n;
        for (held, new) in [(&mut self.keys, k), (&mut self.values, v)] {
            let new = new.squeeze_dim::<3>(0).swap_dims(0, 1);
            let at = [0..kv_heads, self.len..end, 0..dim];
            // Without a second owner the assignment is in place.
            let old =
                std::mem::replace(held, Tensor::empty([1, 1, 1], (&new.device(), DType::F32)));
            *held = grown(old, end).slice_assign(at, new);
        }
        self.len = end;
    }

    /// `[kv_heads, capacity, dim]`, the first [`Cache::len`] rows of a head filled.
    pub(crate) fn keys(&self) -> Tensor<B, 3> {
        self.keys.clone()
    }

    /// As [`Cache::keys`].
    pub(crate) fn values(&self) -> Tensor<B, 3> {
        self.values.clone()
    }
}

/// Room for at least `end` tokens.
fn grown<B: Engine>(held: Tensor<B, 3>, end: usize) -> Tensor<B, 3> {
    let [heads, capacity, dim] = held.dims();
    if end <= capacity {
        return held;
    }
    let extra = end.next_multiple_of(GROWTH) - capacity;
    let zeros = Tensor::zeros([heads, extra, dim], (&held.device(), held.dtype()));
    Tensor::cat(vec![held, zeros], 1)
}
