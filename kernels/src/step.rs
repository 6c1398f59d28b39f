//! One token through a whole model as a fixed program: what an engine may run at once, again and again, with another token
//! and position each time.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::{PackedWeight, Scores};

/// A vector of activations of the token, by its number; 0 is the residual stream.
pub type StepRegister = usize;

/// The operations of a step, in order.
#[derive(Clone, Debug)]
pub struct StepProgram<B: Backend> {
    /// Features of each register.
    pub widths: Vec<usize>,
    /// The operations. The last one gives the logits.
    pub ops: Vec<StepOp<B>>,
    /// Frequencies of each rotary table.
    pub tables: Vec<usize>,
}

/// An operation on registers. Each rounds its results to the weights' dtype.
#[derive(Clone, Debug)]
pub enum StepOp<B: Backend> {
    /// The token's row of `table [vocabulary, hidden]`, times `scale`.
    Embed {
        /// The rows, f16 or bf16, as all weights are.
        table: Tensor<B, 2>,
        /// Factor of a row.
        scale: f64,
        /// Output.
        to: StepRegister,
    },
    /// A norm of each run of as many features as there are weights.
    Norm {
        /// `[features]`.
        weight: Tensor<B, 1>,
        /// The formula.
        norm: StepNorm,
        /// Input.
        from: StepRegister,
        /// Output.
        to: StepRegister,
    },
    /// Linears of one input.
    Linears {
        /// Input.
        from: StepRegister,
        /// The linears.
        linears: Vec<StepLinear<B>>,
    },
    /// Consecutive features of a register.
    Split {
        /// Input.
        from: StepRegister,
        /// Parts, as wide as the registers that they go to.
        to: Vec<StepRegister>,
    },
    /// Attention over a cache, which the token joins: the caches are numbered by these operations.
    Attend {
        /// Queries, keys and values, not rotated.
        qkv: [StepRegister; 3],
        /// Output.
        to: StepRegister,
        /// Query heads, and key and value heads.
        heads: [usize; 2],
        /// Rotary table over the halves of whole heads.
        table: Option<usize>,
        /// From products to weights.
        scores: Scores,
    },
    /// `act(gate) up`.
    Gate {
        /// GELU by a hyperbolic tangent in place of SiLU.
        gelu: bool,
        /// Gate.
        gate: StepRegister,
        /// Features that the gate multiplies.
        up: StepRegister,
        /// Output.
        to: StepRegister,
    },
    /// Adds to the residual stream.
    Add {
        /// Summand.
        from: StepRegister,
        /// Its factor.
        scale: f64,
    },
    /// `weight x` times `scale`, which becomes `cap tanh(logit / cap)` with a cap, in f32.
    Logits {
        /// Input.
        from: StepRegister,
        /// `[vocabulary, hidden]`.
        weight: Tensor<B, 2>,
        /// Factor of the logits.
        scale: f64,
        /// Their bound.
        cap: Option<f64>,
    },
}

/// A linear of a step.
#[derive(Clone, Debug)]
pub struct StepLinear<B: Backend> {
    /// `[out, in]`.
    pub weight: StepWeight<B>,
    /// `[out]`.
    pub bias: Option<Tensor<B, 1>>,
    /// Output.
    pub to: StepRegister,
}

/// The weight of a linear of a step.
#[derive(Clone, Debug)]
pub enum StepWeight<B: Backend> {
    /// f16 or bf16.
    Dense(Tensor<B, 2>),
    /// Codes.
    Packed(PackedWeight<B>),
}

/// Norm of a step, `w n(x)` with `n(x) = x / sqrt(mean(x²) + eps)` in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// Added to the weights.
    pub offset: f64,
    /// `n(x)` is rounded before it meets the weights.
    pub rounded: bool,
    /// The mean is taken off `x` first.
    pub centred: bool,
}

/// A token, its position, and cosines, then sines, of each rotary table there.
#[derive(Clone, Debug)]
pub struct StepToken {
    /// The token.
    pub id: u32,
    /// Its position.
    pub position: usize,
    /// `2 frequencies` values of each table.
    pub tables: Vec<Vec<f32>>,
}

/// A program that an engine can run.
pub trait TokenStep<B: Backend>: Send {
    /// Runs one token and returns its logits. `caches` has keys and values `[kv_heads, capacity, dim]` of each attention,
    /// with the rows before the token's position filled; its own row is written in place.
    fn run(&mut self, token: &StepToken, caches: Vec<[Tensor<B, 3>; 2]>) -> Vec<f32>;
}

impl<B: Backend> StepOp<B> {
    /// Returns true if the operation reads a register.
    pub(crate) fn reads(&self, register: StepRegister) -> bool {
        match self {
            StepOp::Embed { .. } => false,
            StepOp::Norm { from, .. }
            | StepOp::Linears { from, .. }
            | StepOp::Split { from, .. }
            | StepOp::Logits { from, .. } => *from == register,
            StepOp::Add { from, .. } => *from == register || register == 0,
            StepOp::Attend { qkv, .. } => qkv.contains(&register),
            StepOp::Gate { gate, up, .. } => [gate, up].contains(&&register),
        }
    }

    /// Returns true if the operation writes a register.
    pub(crate) fn writes(&self, register: StepRegister) -> bool {
        match self {
            StepOp::Embed { to, .. }
            | StepOp::Norm { to, .. }
            | StepOp::Attend { to, .. }
            | StepOp::Gate { to, .. } => *to == register,
            StepOp::Linears { linears, .. } => linears.iter().any(|it| it.to == register),
            StepOp::Split { to, .. } => to.contains(&register),
            StepOp::Add { .. } => register == 0,
            StepOp::Logits { .. } => false,
        }
    }
}
