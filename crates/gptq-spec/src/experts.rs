//! A mixture of experts in a block: a router chooses experts for each token, and their outputs are summed with its
//! weights.
//!
//! With the router's weights `R [experts, features]`, a token `x` and a top-k of the scores:
//!
//! ```text
//! route      s = score(R x), chosen by s + correction      c_j = s of the j-th chosen, renormalised and scaled
//! dispatch   each of the chosen experts' linears on x      slots [top_k, features], one after the other in a row
//! combine    Σ_j c_j W_j slot_j
//! ```
//!
//! Between dispatch and combine a register has a token's slots in a row, so that gates and storage need not know of
//! experts. Every expert of a block has linears of the same shapes: the `n` inputs of a tap of experts are those of
//! the experts, in order.

use crate::register::Register;

/// Choice of experts by a router.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// Number of experts.
    pub experts: usize,
    /// Experts that a token is given to.
    pub top_k: usize,
    /// Scores of the experts.
    pub scoring: Scoring,
    /// True if the weights of a token's experts are divided by their sum.
    pub renormalize: bool,
    /// Factor of the weights.
    pub scale: f64,
}

/// Scores from a router's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// A distribution over all experts.
    Softmax,
    /// `1 / (1 + exp(-logit))`, each by itself.
    Sigmoid,
}

/// An operation that chooses experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// The router's weights among the block's matrices.
    pub router: usize,
    /// Input.
    pub from: Register,
    /// The choice. It is kept beside the other registers, as two numbers of 32 bits for each expert of a token.
    pub to: Register,
    /// The choice's rule.
    pub how: Routing,
}

/// A matrix that is not quantized: a router, or the gate of a shared expert.
#[derive(Clone, Debug, PartialEq)]
pub struct MatrixSpec {
    pub(crate) stem: &'static str,
    /// Module name within the block.
    pub name: String,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// True if a number for each output, f32, is added to the scores for the choice alone.
    pub correction: bool,
}

/// Name of the tensor with a router's correction.
const CORRECTION: &str = "e_score_correction_bias";

impl MatrixSpec {
    /// Module name in block `layer` of a checkpoint.
    pub fn module(&self, layer: usize) -> String {
        format!("{}layers.{layer}.{}", self.stem, self.name)
    }

    /// Name of the weights in block `layer`.
    pub fn weight(&self, layer: usize) -> String {
        format!("{}.weight", self.module(layer))
    }

    /// Name of the correction in block `layer`, if there is one.
    pub fn correction(&self, layer: usize) -> Option<String> {
        let name = || format!("{}.{CORRECTION}", self.module(layer));
        self.correction.then(name)
    }
}
