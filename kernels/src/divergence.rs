//! Distances of predictions from a reference's, from Burn's operations, in f32.
//!
//! With `p = softmax(reference)` and `q = softmax(logits)` of a row, the Kullback-Leibler divergence is
//! `KL(p ‖ q) = Σ p (ln p - ln q)`, and its gradient with respect to `logits` is `q - p`.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, activation::log_softmax};

/// See [`Engine::compare_logits`](crate::Engine::compare_logits).
pub(crate) fn compare_logits<B: Backend>(
    logits: Tensor<B, 2>,
    reference: Tensor<B, 2>,
    targets: Tensor<B, 1, Int>,
) -> Tensor<B, 2> {
    let [log_q, log_p] = [logits, reference].map(|it| log_softmax(it, 1));
    let targets: Tensor<B, 2, Int> = targets.unsqueeze_dim(1);
    let loss = |log_p: &Tensor<B, 2>| log_p.clone().gather(1, targets.clone()).neg();
    let (own, right) = (loss(&log_q), loss(&log_p));
    let likeliest = |log_p: &Tensor<B, 2>| log_p.clone().argmax(1);
    let agree = likeliest(&log_q).equal(likeliest(&log_p));
    let agree = agree.float().cast(DType::F32);
    let divergence = (log_p.clone().exp() * (log_p - log_q)).sum_dim(1);
    Tensor::cat(vec![own, right, divergence, agree], 1)
}

/// See [`Engine::divergence_gradient`](crate::Engine::divergence_gradient).
pub(crate) fn divergence_gradient<B: Backend>(
    logits: Tensor<B, 2>,
    reference: Tensor<B, 2>,
    scale: f32,
    dtype: DType,
) -> [Tensor<B, 2>; 2] {
    let [log_q, log_p] = [logits, reference].map(|it| log_softmax(it, 1));
    let p = log_p.clone().exp();
    let gradient = (log_q.clone().exp() - p.clone()).mul_scalar(scale);
    let divergence = (p * (log_p - log_q)).sum_dim(1);
    [divergence, gradient.cast(dtype)]
}

#[cfg(test)]
mod tests;
