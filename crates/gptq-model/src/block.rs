//! A decoder block on a device: the interpreter of its [`BlockSpec`].
//!
//! ```text
//! input(tap)     the tensor that the tap's linears are given
//! advance(taps)  from before the first of these taps to before the tap after the last
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, PackedWeight};
use gptq_spec::{Attention, BlockSpec, Op, Register, Rope};

use crate::{Cache, rope};

/// `y = x wᵀ + bias`.
#[derive(Clone, Debug)]
pub struct Linear<B: Engine> {
    /// `[out, in]`.
    pub weight: Weight<B>,
    /// `[out]`, compute dtype.
    pub bias: Option<Tensor<B, 1>>,
}

/// Weights `[out, in]` on the device.
#[derive(Clone, Debug)]
pub enum Weight<B: Engine> {
    /// In the compute dtype.
    Dense(Tensor<B, 2>),
    /// As codes; only where a backend multiplies with them ([`Engine::KEEPS_PACKED`]).
    Packed(PackedWeight<B>),
}

impl<B: Engine> Weight<B> {
    /// In `dtype`, the compute dtype; packed ones are dequantized.
    pub fn dense(&self, dtype: DType) -> Tensor<B, 2> {
        match self {
            Weight::Dense(weight) => weight.clone(),
            Weight::Packed(packed) => {
                B::dequantize_packed(&packed.download(), dtype, &packed.device())
            }
        }
    }
}

impl<B: Engine> Linear<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let y = match &self.weight {
            Weight::Dense(weight) => B::matmul_nt(x, weight.clone()),
            Weight::Packed(packed) => B::packed_matmul_nt(x, packed),
        };
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }
}

/// Hidden states of some windows before a tap. Cloning shares the tensors.
#[derive(Clone, Debug)]
pub struct Flow<B: Engine> {
    /// How many windows; the tokens of a window are consecutive rows.
    pub windows: usize,
    /// `[windows * seq, hidden]`.
    pub residual: Tensor<B, 2>,
    /// The other registers that are still to be read, `[windows * seq, features]`; none between blocks.
    pub activations: BTreeMap<Register, Tensor<B, 2>>,
}

impl<B: Engine> Flow<B> {
    /// States between two blocks.
    pub fn new(windows: usize, residual: Tensor<B, 2>) -> Self {
        Flow {
            windows,
            residual,
            activations: BTreeMap::new(),
        }
    }

    /// What a register holds; `None` where nothing is to read it any more.
    pub fn register(&self, register: Register) -> Option<Tensor<B, 2>> {
        match register {
            Register::RESIDUAL => Some(self.residual.clone()),
            _ => self.activations.get(&register).cloned(),
        }
    }

    /// The same states in another dtype: a 16-bit one to keep them, the compute dtype to run on.
    pub fn cast(self, dtype: DType) -> Self {
        let activations = self.activations.into_iter();
        Flow {
            windows: self.windows,
            residual: self.residual.cast(dtype),
            activations: activations
                .map(|(r, states)| (r, states.cast(dtype)))
                .collect(),
        }
    }
}

/// A tensor that comes up inside a block, as [`Block::observed`] shows it.
#[derive(Clone, Debug)]
pub enum Seen<B: Engine> {
    /// What a linear, by its index in the spec, gives: `[tokens, out_features]`.
    Output(usize, Tensor<B, 2>),
    /// Rotated queries `[windows, seq, heads, dim]` and keys `[windows, seq, kv_heads, dim]`.
    Rotated(Tensor<B, 4>, Tensor<B, 4>),
    /// The gated activation: `[tokens, features]`.
    Gated(Tensor<B, 2>),
    /// The residual stream: `[tokens, hidden]`.
    Residual(Tensor<B, 2>),
}

/// A block's weights on the device. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Block<B: Engine> {
    pub(crate) spec: Arc<BlockSpec>,
    /// In the order of the spec's.
    pub(crate) linears: Vec<Linear<B>>,
    /// In the order of the spec's.
    pub(crate) vectors: Vec<Tensor<B, 1>>,
    pub(crate) rope: rope::Tables<B>,
}

impl<B: Engine> Block<B> {
    /// What it runs.
    pub fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    /// A linear by its index in the spec.
    pub fn linear(&self, linear: usize) -> &Linear<B> {
        &self.linears[linear]
    }

    /// Replaces a linear's weights, keeping its bias.
    pub fn set_weight(&mut self, linear: usize, weight: Tensor<B, 2>) {
        self.linears[linear].weight = Weight::Dense(weight);
    }

    /// The input of the linears of `tap`, `[tokens, in_features]`.
    pub fn input(&self, tap: usize, flow: &Flow<B>) -> Tensor<B, 2> {
        let tap = self.spec.tap(tap);
        let mut flow = self.run(tap.start..tap.at, flow.clone(), None, &mut |_| ());
        self.read(&mut flow, tap.from, tap.at)
    }

    /// Runs the linears of `taps` and what stands between them, up to the next tap.
    pub fn advance(&self, taps: Range<usize>, flow: Flow<B>) -> Flow<B> {
        self.run(self.spec.ops_of(taps), flow, None, &mut |_| ())
    }

    /// The whole block.
    pub fn forward(&self, flow: Flow<B>) -> Flow<B> {
        self.observed(flow, &mut |_| ())
    }

    /// The whole block, showing `observe` what comes up on the way.
    pub fn observed(&self, flow: Flow<B>, observe: &mut dyn FnMut(Seen<B>)) -> Flow<B> {
        self.run(0..self.spec.ops().len(), flow, None, observe)
    }

    /// The whole block for the tokens that follow those in `cache`, which gains theirs: one window.
    pub fn forward_cached(&self, flow: Flow<B>, cache: &mut Cache<B>) -> Flow<B> {
        let ops = 0..self.spec.ops().len();
        self.run(ops, flow, Some(cache), &mut |_| ())
    }

    /// Runs the operations `ops`.
    fn run(
        &self,
        ops: Range<usize>,
        mut flow: Flow<B>,
        mut cache: Option<&mut Cache<B>>,
        observe: &mut dyn FnMut(Seen<B>),
    ) -> Flow<B> {
        for at in ops {
            let mut read = |register: Register| self.read(&mut flow, register, at);
            match &self.spec.ops()[at] {
                Op::Norm {
                    vector,
                    eps,
                    from,
                    to,
                } => {
                    let y = self.norm(read(*from), *vector, *eps);
                    flow.activations.insert(*to, y);
                }
                Op::Linears { from, outputs } => {
                    let x = read(*from);
                    for &(linear, to) in outputs {
                        let y = self.linears[linear].forward(x.clone());
                        observe(Seen::Output(linear, y.clone()));
                        flow.activations.insert(to, y);
                    }
                }
                Op::Attend(attention) => {
                    let qkv = attention.qkv.map(read);
                    let cache = cache.as_deref_mut();
                    let attended = self.attend(attention, qkv, flow.windows, cache, observe);
                    flow.activations.insert(attention.to, attended);
                }
                Op::Gate { gate, up, to } => {
                    let y = B::swiglu(read(*gate), read(*up));
                    observe(Seen::Gated(y.clone()));
                    flow.activations.insert(*to, y);
                }
                Op::Add { from } => {
                    let y = read(*from);
                    flow.residual = flow.residual + y;
                    observe(Seen::Residual(flow.residual.clone()));
                }
            }
        }
        flow
    }

    /// The tensor in a register, for operation `at`; the last that reads it takes it out.
    fn read(&self, flow: &mut Flow<B>, register: Register, at: usize) -> Tensor<B, 2> {
        let states = if register == Register::RESIDUAL || self.spec.is_read(register, at + 1) {
            flow.register(register)
        } else {
            flow.activations.remove(&register)
        };
        states.expect("an earlier operation wrote it")
    }

    fn norm(&self, x: Tensor<B, 2>, vector: usize, eps: f64) -> Tensor<B, 2> {
        let weight = self.vectors[vector].clone();
        let ([tokens, features], [len]) = (x.dims(), weight.dims());
        if features == len {
            return B::rms_norm(x, weight, eps);
        }
        let runs = x.reshape([tokens * (features / len), len]);
        B::rms_norm(runs, weight, eps).reshape([tokens, features])
    }

    /// Attention of `q`, `k` and `v`, `[tokens, features]` each, and over the tokens in `cache`.
    fn attend(
        &self,
        attention: &Attention,
        [q, k, v]: [Tensor<B, 2>; 3],
        windows: usize,
        cache: Option<&mut Cache<B>>,
        observe: &mut dyn FnMut(Seen<B>),
    ) -> Tensor<B, 2> {
        let tokens = q.dims()[0];
        let split = |x: Tensor<B, 2>, heads: usize| {
            x.reshape([windows, tokens / windows, heads, attention.head_dim])
        };
        let qkv = [
            split(q, attention.heads),
            split(k, attention.kv_heads),
            split(v, attention.kv_heads),
        ];
        let attended = match cache.map(|cache| (cache.len(), cache)) {
            None => {
                let [q, k, v] = self.rotated(&attention.rope, qkv, 0);
                observe(Seen::Rotated(q.clone(), k.clone()));
                B::causal_attention(q, k, v)
            }
            Some((0, cache)) => {
                let [q, k, v] = self.rotated(&attention.rope, qkv, 0);
                cache.push(k.clone(), v.clone());
                B::causal_attention(q, k, v)
            }
            Some((start, cache)) if tokens == 1 => {
                let device = qkv[0].device();
                let (cos, sin) = self.rope.get(&attention.rope, start, 1, &device);
                cache.attend_next(qkv, [cos, sin])
            }
            Some((start, cache)) => {
                let [q, k, v] = self.rotated(&attention.rope, qkv, start);
                cache.push(k, v);
                B::cached_attention(q, cache.keys(), cache.values(), start)
            }
        };
        attended.reshape([tokens, attention.heads * attention.head_dim])
    }

    /// Queries, keys and values, `[windows, seq, heads, dim]` each, with the first two rotated for
    /// positions from `start`.
    fn rotated(
        &self,
        rope: &Rope,
        [q, k, v]: [Tensor<B, 4>; 3],
        start: usize,
    ) -> [Tensor<B, 4>; 3] {
        let (cos, sin) = self.rope.get(rope, start, q.dims()[1], &q.device());
        let q = B::rotary(q, cos.clone(), sin.clone());
        [q, B::rotary(k, cos, sin), v]
    }
}

#[cfg(test)]
mod tests;
