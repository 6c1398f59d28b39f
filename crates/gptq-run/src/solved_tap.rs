//! Linears at a tap with their solutions.

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, Subset};
use gptq_plan::PlannedLinear;

use crate::moved::squares;

/// The linears at a tap with their solutions.
pub(crate) struct SolvedTap<B: Engine> {
    pub(crate) linears: Vec<PlannedLinear>,
    pub(crate) subset: Subset<B>,
    /// Time to factor and solve.
    pub(crate) seconds: f64,
}

/// Returns 1 if a linear layer does anything, 0 if all its weights are zero, `[1, 1]` in f32: a block that adds nothing
/// to the residual stream is not to make up for others either.
pub(crate) fn acts<B: Engine>(weight: Tensor<B, 2>) -> Tensor<B, 2> {
    squares(weight.cast(DType::F32)).sum_dim(0).sign()
}

/// A solved tap of a branch that is tuned.
pub(crate) struct Waiting<B: Engine> {
    pub(crate) tap: usize,
    pub(crate) solved: SolvedTap<B>,
    /// `XᵀX` of its input, upper triangle.
    pub(crate) gram: Tensor<B, 2>,
}
