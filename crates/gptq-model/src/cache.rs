//! A block's keys and values of the tokens so far, kept between steps of generation.

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, append};
use gptq_spec::BlockSpec;

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
    /// An empty one for the attention of `block`, its keys and values of this dtype.
    pub fn new(block: &BlockSpec, dtype: DType, device: &B::Device) -> Self {
        let attention = block.attention().expect("every block attends");
        let shape = [attention.kv_heads, GROWTH, attention.head_dim];
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

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens but the first `len`.
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

    /// Adds one token, and gives its attention, `[1, 1, heads * dim]`: `q`, `k` and `v`
    /// `[1, 1, heads, dim]` not rotated yet, `tables` the cosines and sines of its position.
    pub(crate) fn attend_next(
        &mut self,
        qkv: [Tensor<B, 4>; 3],
        tables: [Tensor<B, 2>; 2],
    ) -> Tensor<B, 3> {
        self.make_room(1);
        let attended = B::attend_next(qkv, tables, &mut self.keys, &mut self.values, self.len);
        self.len += 1;
        attended
    }

    /// Makes room for `n` tokens more.
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

    /// `[kv_heads, capacity, dim]`, the first [`Cache::len`] rows of a head filled.
    pub(crate) fn keys(&self) -> Tensor<B, 3> {
        self.keys.clone()
    }

    /// As [`Cache::keys`].
    pub(crate) fn values(&self) -> Tensor<B, 3> {
        self.values.clone()
    }
}
