//! The final norm and the output projection: from hidden states to logits, and back to the gradient of a divergence.

use burn::tensor::{DType, Int, Tensor, TensorData, activation::log_softmax};
use gptq_kernels::Engine;
use gptq_spec::{Ends, Norm};

use crate::backward::norm_gradient;
use crate::block::normalized;
use crate::experts::indices;

/// Logits that are computed at once where only sums of them are kept.
const PIECE: usize = 1 << 26;
/// Factor of a divergence's gradient with respect to logits: of these, none is above 1, and those of unlikely tokens
/// would be below f16's range.
const GRADIENT_SCALE: f32 = 256.0;

/// The final norm and the output projection.
pub struct Head<B: Engine> {
    pub(crate) weights: Tensor<B, 1>,
    pub(crate) norm: Norm,
    pub(crate) weight: Tensor<B, 2>,
    pub(crate) ends: Ends,
}

impl<B: Engine> Head<B> {
    /// Returns logits `[tokens, vocabulary]` in f32 for hidden states `[tokens, hidden]` after the
    /// last block.
    pub fn logits(&self, hidden: Tensor<B, 2>) -> Tensor<B, 2> {
        let hidden = hidden.cast(self.weights.dtype());
        let x = normalized(hidden, self.weights.clone(), self.norm);
        let logits = B::matmul_nt(x, self.weight.clone()).cast(DType::F32);
        let logits = match self.ends.logits {
            1.0 => logits,
            scale => logits * scale,
        };
        match self.ends.softcap {
            None => logits,
            Some(cap) => (logits / cap).tanh() * cap,
        }
    }

    /// Returns `-ln p(targets[i] | hidden[i])` for hidden states `[tokens, hidden]`, one per
    /// target.
    pub fn negative_log_likelihoods(&self, hidden: Tensor<B, 2>, targets: &[u32]) -> Vec<f32> {
        let ids: Vec<i32> = targets.iter().map(|&t| t as i32).collect();
        let ids = Tensor::<B, 2, Int>::from_data(
            TensorData::new(ids, [targets.len(), 1]),
            (&hidden.device(), DType::I32),
        );
        let picked = log_softmax(self.logits(hidden), 1).gather(1, ids).neg();
        picked
            .into_data()
            .to_vec::<f32>()
            .expect("the logits are f32")
    }

    /// Returns `ln p(token | hidden[row])` for each `(row, token)` of `targets`, which may name a row of the hidden states
    /// `[tokens, hidden]` more than once. There are at most [`Head::rows_at_once`] of these.
    pub fn log_likelihoods(&self, hidden: Tensor<B, 2>, targets: &[(usize, u32)]) -> Vec<f32> {
        let log_p = log_softmax(self.logits(hidden), 1);
        let [rows, vocabulary] = log_p.dims();
        let places = targets.iter().map(|&(row, token)| {
            assert!(row < rows && (token as usize) < vocabulary, "a target");
            row as u32 * vocabulary as u32 + token
        });
        let places = indices::<B>(places, &log_p.device());
        let picked = log_p.reshape([rows * vocabulary]).select(0, places);
        let picked = picked.into_data().to_vec::<f32>();
        picked.expect("the logits are f32")
    }

    /// Returns the tokens whose logits are computed at once where only sums of them are kept.
    pub fn rows_at_once(&self) -> usize {
        (PIECE / self.weight.dims()[0]).max(1)
    }

    /// Returns the sum over tokens of the divergence `KL(p ‖ q)` of the predictions `q` for `hidden` from those for
    /// `reference`, `p`, both `[tokens, hidden]` after the last block: f32 `[1, 1]`.
    pub fn divergence(&self, hidden: Tensor<B, 2>, reference: Tensor<B, 2>) -> Tensor<B, 2> {
        self.in_pieces(hidden, reference, &mut |_, _, _| ())
    }

    /// Returns the same as [`Head::divergence`], and its gradient with respect to `hidden`, `[tokens, hidden]` in compute
    /// dtype, times a factor that is the same for every call.
    pub fn divergence_gradient(
        &self,
        hidden: Tensor<B, 2>,
        reference: Tensor<B, 2>,
    ) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let mut pieces = Vec::new();
        let sum = self.in_pieces(hidden, reference, &mut |hidden, logits, gradient| {
            pieces.push(self.reverse(hidden, logits, gradient));
        });
        (sum, Tensor::cat(pieces, 0))
    }

    /// Takes a few tokens at a time; shows `take` their hidden states in compute dtype, logits, and the gradient with
    /// respect to these.
    fn in_pieces(
        &self,
        hidden: Tensor<B, 2>,
        reference: Tensor<B, 2>,
        take: &mut dyn FnMut(Tensor<B, 2>, Tensor<B, 2>, Tensor<B, 2>),
    ) -> Tensor<B, 2> {
        let (tokens, dtype) = (hidden.dims()[0], self.weights.dtype());
        // The gradient of capped logits is scaled once more, in f32.
        let kept = self.ends.softcap.map_or(dtype, |_| DType::F32);
        let mut sums = Vec::new();
        for start in (0..tokens).step_by(self.rows_at_once()) {
            let rows = self.rows_at_once().min(tokens - start);
            let own = hidden.clone().narrow(0, start, rows).cast(dtype);
            let right = self.logits(reference.clone().narrow(0, start, rows));
            let logits = self.logits(own.clone());
            let [sum, gradient] =
                B::divergence_gradient(logits.clone(), right, GRADIENT_SCALE, kept);
            sums.push(sum.sum_dim(0));
            take(own, logits, gradient);
        }
        Tensor::cat(sums, 0).sum_dim(0)
    }

    /// The gradient with respect to `hidden`, in compute dtype, for that with respect to its logits.
    fn reverse(
        &self,
        hidden: Tensor<B, 2>,
        logits: Tensor<B, 2>,
        gradient: Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        let gradient = match self.ends.softcap {
            None => gradient,
            // c tanh(z / c) has the slope 1 - tanh².
            Some(cap) => {
                let bounded = logits / cap;
                gradient * ((bounded.clone() * bounded).neg() + 1.0)
            }
        };
        let gradient = match self.ends.logits {
            1.0 => gradient,
            scale => gradient * scale,
        };
        let dx = B::matmul_nn(gradient.cast(self.weights.dtype()), self.weight.clone());
        norm_gradient(hidden, self.weights.clone(), self.norm, dx)
    }
}

#[cfg(test)]
mod tests;
