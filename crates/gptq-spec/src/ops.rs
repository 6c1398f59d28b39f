//! Operations of a block, a closed list: what each reads, writes and is told.

use std::ops::Range;

use crate::RopeScaling;
use crate::experts::Route;
use crate::register::Register;

/// An operation of a block. Vectors, matrices and linears are indices into the block's lists.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// A norm over each run of as many features as the vector has: all of them, or those of one head.
    Norm {
        /// Weights.
        vector: usize,
        /// Formula and constants.
        norm: Norm,
        /// Input.
        from: Register,
        /// Output.
        to: Register,
    },
    /// The linears of one tap on its input.
    Linears {
        /// Input.
        from: Register,
        /// Each linear and its output.
        outputs: Vec<(usize, Register)>,
    },
    /// Consecutive features of a register, each part as wide as the register that it goes to.
    Split {
        /// Input.
        from: Register,
        /// Outputs.
        to: Vec<Register>,
    },
    /// Causal attention.
    Attend(Attention),
    /// `to = act(gate) * up`.
    Gate {
        /// Activation.
        act: Activation,
        /// Gate.
        gate: Register,
        /// Features that the gate multiplies.
        up: Register,
        /// Output.
        to: Register,
    },
    /// A choice of experts for each token.
    Route(Route),
    /// Linears of experts, each on the tokens that it is chosen for.
    Dispatch {
        /// Input.
        from: Register,
        /// The choice.
        routing: Register,
        /// Linears, as many of each expert as there are outputs, expert by expert.
        linears: Range<usize>,
        /// Outputs, a slot for each expert of a token.
        to: Vec<Register>,
    },
    /// One linear of each expert on the slots that are its own, summed for each token with the weights of the choice.
    Combine {
        /// Slots.
        from: Register,
        /// Input of the experts' first linears: for experts that are given too few tokens to calibrate on.
        x: Register,
        /// The choice.
        routing: Register,
        /// Linears, one of each expert.
        linears: Range<usize>,
        /// Output.
        to: Register,
    },
    /// `to = from sigmoid(x · w)`: one factor for each token.
    Weigh {
        /// Features that are multiplied.
        from: Register,
        /// Input of the factor.
        x: Register,
        /// Its weights among the block's matrices, of one output.
        matrix: usize,
        /// Output.
        to: Register,
    },
    /// Adds to the residual stream.
    Add {
        /// Summand.
        from: Register,
        /// Its factor.
        scale: f64,
    },
}

/// A norm of a row `x` with weights `w`, but for these. Its mean and its square root are taken in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// The formula.
    pub kind: NormKind,
    /// Added to the mean square.
    pub eps: f64,
}

/// Formulas of norms, with `n(x) = x / sqrt(mean(x²) + eps)` and `round` to the compute type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// `w round(n(x))`.
    Rms,
    /// `round(w n(x))`.
    RmsF32,
    /// `round((1 + w) n(x))`.
    RmsPlusOne,
    /// `round(w n(x - mean(x)))`.
    Layer,
}

/// Activations of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// GELU, approximated by a hyperbolic tangent.
    GeluTanh,
}

/// Causal attention of rotated queries over rotated keys. The rotation is part of it because an engine may
/// rotate a token as it joins the cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Queries, keys and values, not rotated.
    pub qkv: [Register; 3],
    /// Output, as wide as the queries.
    pub to: Register,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Parameters of the attention.
    pub how: Attending,
}

/// Attention of one head.
#[derive(Clone, Debug, PartialEq)]
pub struct Attending {
    /// Features per head.
    pub head_dim: usize,
    /// Rotary embedding, if there is one.
    pub rope: Option<Rope>,
    /// Factor of the products of queries and keys; `1 / sqrt(head_dim)` where none is given.
    pub scale: Option<f64>,
    /// Bound `c` of the scores, which become `c tanh(score / c)`.
    pub softcap: Option<f64>,
    /// Tokens that one sees, itself included, where that is not all before it.
    pub window: Option<usize>,
}

/// A rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Features of a head that are rotated: the first.
    pub dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling of the frequencies for long contexts.
    pub scaling: RopeScaling,
    /// True if neighbouring features are rotated together, in place of one of either half.
    pub interleaved: bool,
}

impl Op {
    pub(crate) fn reads(&self, register: Register) -> bool {
        match self {
            Op::Norm { from, .. }
            | Op::Linears { from, .. }
            | Op::Split { from, .. }
            | Op::Add { from, .. }
            | Op::Route(Route { from, .. }) => *from == register,
            Op::Dispatch { from, routing, .. } => [from, routing].contains(&&register),
            Op::Combine {
                from, x, routing, ..
            } => [from, x, routing].contains(&&register),
            Op::Weigh { from, x, .. } => [from, x].contains(&&register),
            Op::Attend(attention) => attention.qkv.contains(&register),
            Op::Gate { gate, up, .. } => [gate, up].contains(&&register),
        }
    }

    pub(crate) fn writes(&self, register: Register) -> bool {
        match self {
            Op::Norm { to, .. }
            | Op::Gate { to, .. }
            | Op::Route(Route { to, .. })
            | Op::Combine { to, .. }
            | Op::Weigh { to, .. } => *to == register,
            Op::Dispatch { to, .. } => to.contains(&register),
            Op::Attend(attention) => attention.to == register,
            Op::Split { to, .. } => to.contains(&register),
            Op::Linears { outputs, .. } => outputs.iter().any(|(_, to)| *to == register),
            Op::Add { .. } => register == Register::RESIDUAL,
        }
    }
}
