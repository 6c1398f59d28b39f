//! One decoder block, a stage at a time.
//!
//! ```text
//! Qkv           input = norm1(residual)    advance: activation = attention(q, k, v)
//! AttentionOut  input = activation         advance: residual += o(activation)
//! GateUp        input = norm2(residual)    advance: activation = silu(gate) * up
//! Down          input = activation         advance: residual += down(activation)
//! ```
//!
//! [`Block::input`] is the tap: exactly the tensor the stage's linears are given by
//! [`Block::advance`].

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, PackedWeight};

use crate::{Cache, ModelConfig, Projection, Stage, rope};

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
    /// In `dtype`, the compute dtype; packed ones are dequantised.
    pub fn dense(&self, dtype: DType) -> Tensor<B, 2> {
        match self {
            Weight::Dense(weight) => weight.clone(),
            Weight::Packed(packed) => B::dequantise(&packed.download(), dtype, &packed.device()),
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

/// Hidden states of some windows between two stages. Cloning shares the tensors.
#[derive(Clone, Debug)]
pub struct Flow<B: Engine> {
    /// How many windows; the tokens of a window are consecutive rows.
    pub windows: usize,
    /// `[windows * seq, hidden]`.
    pub residual: Tensor<B, 2>,
    /// `[windows * seq, features]`: what the next linear takes, after [`Stage::Qkv`] and
    /// [`Stage::GateUp`].
    pub activation: Option<Tensor<B, 2>>,
}

impl<B: Engine> Flow<B> {
    /// The same states in another dtype: a 16-bit one to keep them, the compute dtype to run on.
    pub fn cast(self, dtype: DType) -> Self {
        Flow {
            windows: self.windows,
            residual: self.residual.cast(dtype),
            activation: self.activation.map(|a| a.cast(dtype)),
        }
    }
}

/// A block's weights on the device. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Block<B: Engine> {
    pub(crate) config: ModelConfig,
    pub(crate) linears: Vec<Linear<B>>,
    pub(crate) input_norm: Tensor<B, 1>,
    pub(crate) post_norm: Tensor<B, 1>,
    pub(crate) rope: rope::Tables<B>,
}

impl<B: Engine> Block<B> {
    /// A linear by name.
    pub fn linear(&self, projection: Projection) -> &Linear<B> {
        &self.linears[projection as usize]
    }

    /// Replaces a linear's weights, keeping its bias.
    pub fn set_weight(&mut self, projection: Projection, weight: Tensor<B, 2>) {
        self.linears[projection as usize].weight = Weight::Dense(weight);
    }

    /// What the linears of `stage` are given: `[tokens, in_features]`.
    pub fn input(&self, stage: Stage, flow: &Flow<B>) -> Tensor<B, 2> {
        let eps = self.config.rms_norm_eps;
        let norm = |weight: &Tensor<B, 1>| B::rms_norm(flow.residual.clone(), weight.clone(), eps);
        match stage {
            Stage::Qkv => norm(&self.input_norm),
            Stage::GateUp => norm(&self.post_norm),
            Stage::AttentionOut | Stage::Down => flow
                .activation
                .clone()
                .expect("the stage before left its activation"),
        }
    }

    /// Runs the linears of `stage` and what follows them up to the next stage's input.
    pub fn advance(&self, stage: Stage, flow: Flow<B>) -> Flow<B> {
        let x = self.input(stage, &flow);
        let run = |p: Projection, x: Tensor<B, 2>| self.linear(p).forward(x);
        match stage {
            Stage::Qkv => {
                let tokens = x.dims()[0];
                let [q, k, v] = self.rotated(self.qkv(x, flow.windows), 0);
                let attended = B::causal_attention(q, k, v);
                Flow {
                    activation: Some(attended.reshape([tokens, self.attention_width()])),
                    ..flow
                }
            }
            Stage::GateUp => {
                let (gate, up) = (run(Projection::Gate, x.clone()), run(Projection::Up, x));
                Flow {
                    activation: Some(B::swiglu(gate, up)),
                    ..flow
                }
            }
            Stage::AttentionOut => self.add(flow, run(Projection::O, x)),
            Stage::Down => self.add(flow, run(Projection::Down, x)),
        }
    }

    /// All four stages.
    pub fn forward(&self, flow: Flow<B>) -> Flow<B> {
        Stage::ALL
            .into_iter()
            .fold(flow, |flow, stage| self.advance(stage, flow))
    }

    fn add(&self, flow: Flow<B>, y: Tensor<B, 2>) -> Flow<B> {
        Flow {
            windows: flow.windows,
            residual: flow.residual + y,
            activation: None,
        }
    }

    /// All four stages for the tokens that follow those in `cache`, which gains theirs: one window.
    pub fn forward_cached(&self, flow: Flow<B>, cache: &mut Cache<B>) -> Flow<B> {
        let x = self.input(Stage::Qkv, &flow);
        let (tokens, start) = (x.dims()[0], cache.len());
        let qkv = self.qkv(x, 1);
        let attended = match (tokens, start) {
            (_, 0) => {
                let [q, k, v] = self.rotated(qkv, 0);
                cache.push(k.clone(), v.clone());
                B::causal_attention(q, k, v)
            }
            (1, _) => {
                let (cos, sin) = self.rope.get(&self.config, start, 1, &qkv[0].device());
                cache.attend_next(qkv, [cos, sin])
            }
            _ => {
                let [q, k, v] = self.rotated(qkv, start);
                cache.push(k, v);
                B::cached_attention(q, cache.keys(), cache.values(), start)
            }
        };
        let flow = Flow {
            activation: Some(attended.reshape([tokens, self.attention_width()])),
            ..flow
        };
        let rest = Stage::ALL.into_iter().skip(1);
        rest.fold(flow, |flow, stage| self.advance(stage, flow))
    }

    /// Queries, keys and values, each `[windows, seq, heads, dim]`, of `x [windows * seq, hidden]`.
    fn qkv(&self, x: Tensor<B, 2>, windows: usize) -> [Tensor<B, 4>; 3] {
        let seq = x.dims()[0] / windows;
        let run = |p: Projection, heads: usize| {
            let y = self.linear(p).forward(x.clone());
            y.reshape([windows, seq, heads, self.config.head_dim])
        };
        [
            run(Projection::Q, self.config.heads),
            run(Projection::K, self.config.kv_heads),
            run(Projection::V, self.config.kv_heads),
        ]
    }

    /// The same with queries and keys rotated for positions from `start`.
    fn rotated(&self, [q, k, v]: [Tensor<B, 4>; 3], start: usize) -> [Tensor<B, 4>; 3] {
        let (cos, sin) = (self.rope).get(&self.config, start, q.dims()[1], &q.device());
        [
            B::rotary(q, cos.clone(), sin.clone()),
            B::rotary(k, cos, sin),
            v,
        ]
    }

    fn attention_width(&self) -> usize {
        self.config.heads * self.config.head_dim
    }
}
