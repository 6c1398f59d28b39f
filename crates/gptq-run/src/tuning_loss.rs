//! The distances that a block is tuned towards zero.
//!
//! With the branch's residual stream after the block `r` and the dense model's `r_d`: `Σ ‖r - r_d‖²`, or after the last
//! block `Σ KL(p(r_d) ‖ p(r))` of the predictions that the head makes of them. The first treats all of a token's
//! features alike; which of them matter only what comes after the block can tell, and after the last that is the head.

use burn::tensor::{DType, Tensor};
use gptq_kernels::Engine;
use gptq_model::Head;
use gptq_plan::TuningLoss;

use crate::moved::squares;

/// Root mean square of the gradient as it enters the block: in the middle of f16's range.
const SCALE: f64 = 0.1;
/// Largest magnitude of it.
const BOUND: f32 = 1e4;

/// A distance.
pub(crate) enum BlockLoss<B: Engine> {
    /// Squared distance of the residual streams.
    Output,
    /// Divergence of the predictions.
    Predictions(Head<B>),
}

impl<B: Engine> BlockLoss<B> {
    /// Returns which it is, for the report.
    pub(crate) fn kind(&self) -> TuningLoss {
        match self {
            BlockLoss::Output => TuningLoss::Output,
            BlockLoss::Predictions(_) => TuningLoss::Predictions,
        }
    }

    /// Returns the sum over tokens for the residual streams `own` and `dense`, `[tokens, hidden]` each: f32 `[1, 1]`.
    pub(crate) fn of(&self, own: Tensor<B, 2>, dense: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            BlockLoss::Output => total(own.cast(DType::F32) - dense.cast(DType::F32)),
            BlockLoss::Predictions(head) => head.divergence(own, dense),
        }
    }

    /// Returns what that sum is told as a part of, f32 `[1, 1]`: the squared length of what the dense block adds to
    /// `before`, or the number of tokens.
    pub(crate) fn whole(&self, before: Tensor<B, 2>, dense: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            BlockLoss::Output => total(dense.cast(DType::F32) - before.cast(DType::F32)),
            BlockLoss::Predictions(_) => {
                let tokens = dense.dims()[0] as f64;
                Tensor::full([1, 1], tokens, (&dense.device(), DType::F32))
            }
        }
    }

    /// Returns what a gradient of this size is divided by, f32 `[1, 1]`.
    pub(crate) fn size(&self, own: Tensor<B, 2>, dense: Tensor<B, 2>) -> Tensor<B, 2> {
        let (_, gradient) = self.slope(own, dense);
        let values = gradient.dims().iter().product::<usize>() as f64;
        let rms = (total(gradient) / values).sqrt();
        (rms / SCALE).add_scalar(f32::MIN_POSITIVE)
    }

    /// Returns the same as [`BlockLoss::of`], and its gradient with respect to `own` divided by `size`, in the dtype of `own`.
    pub(crate) fn gradient(
        &self,
        own: Tensor<B, 2>,
        dense: Tensor<B, 2>,
        size: &Tensor<B, 2>,
    ) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let dtype = own.dtype();
        let (loss, gradient) = self.slope(own, dense);
        let gradient = gradient / size.clone();
        (loss, gradient.clamp(-BOUND, BOUND).cast(dtype))
    }

    /// Returns the same as [`BlockLoss::of`], and a multiple of its gradient with respect to `own`, f32.
    fn slope(&self, own: Tensor<B, 2>, dense: Tensor<B, 2>) -> (Tensor<B, 2>, Tensor<B, 2>) {
        match self {
            BlockLoss::Output => {
                let off = own.cast(DType::F32) - dense.cast(DType::F32);
                (total(off.clone()), off)
            }
            BlockLoss::Predictions(head) => {
                let (loss, gradient) = head.divergence_gradient(own, dense);
                (loss, gradient.cast(DType::F32))
            }
        }
    }
}

/// Returns the squared length of all of `x`, `[1, 1]`.
fn total<B: Engine>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    squares(x).sum_dim(0)
}
