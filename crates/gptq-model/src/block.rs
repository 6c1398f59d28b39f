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
use gptq_kernels::Engine;

use crate::{ModelConfig, Projection, Stage, rope};

/// `y = x wᵀ + bias`.
#[derive(Clone, Debug)]
pub struct Linear<B: Engine> {
    /// `[out, in]`, compute dtype.
    pub weight: Tensor<B, 2>,
    /// `[out]`, compute dtype.
    pub bias: Option<Tensor<B, 1>>,
}

impl<B: Engine> Linear<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let y = B::matmul_nt(x, self.weight.clone());
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
    /// The same states in another dtype: f16 to keep them, the compute dtype to run on.
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
        self.linears[projection as usize].weight = weight;
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
                let (q, k, v) = (
                    run(Projection::Q, x.clone()),
                    run(Projection::K, x.clone()),
                    run(Projection::V, x),
                );
                Flow {
                    activation: Some(self.attention(flow.windows, q, k, v)),
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

    fn attention(
        &self,
        windows: usize,
        q: Tensor<B, 2>,
        k: Tensor<B, 2>,
        v: Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        let (dim, tokens) = (self.config.head_dim, q.dims()[0]);
        let seq = tokens / windows;
        let split = |x: Tensor<B, 2>, heads: usize| x.reshape([windows, seq, heads, dim]);
        let (cos, sin) = self.rope.get(&self.config, seq, &q.device());
        let q = B::rotary(split(q, self.config.heads), cos.clone(), sin.clone());
        let k = B::rotary(split(k, self.config.kv_heads), cos, sin);
        let v = split(v, self.config.kv_heads);
        B::causal_attention(q, k, v).reshape([tokens, self.config.heads * dim])
    }
}
