//! Reverse passes of attention, norms and gates from Burn's operations, in f32 and rounded once.
//!
//! For the gradient `dy` of an operation's output each gives those of its inputs. Rounding inside an operation is
//! passed over, as if it were none.
//!
//! ```text
//! attention  P = softmax(s(scale Q Kᵀ)), Y = P V    dV = Pᵀ dY, dP = dY Vᵀ, dS = P (dP - Σ P dP) s',
//!                                                   dQ = scale dS K, dK = scale dSᵀ Q
//! norm       n = c / sqrt(mean(c²) + eps), y = w n  dx = (w dy - n mean(w dy n)) / sqrt(mean(c²) + eps)
//! gate       y = act(gate) up                       d_gate = dy up act'(gate), d_up = dy act(gate)
//! ```

use burn::tensor::backend::Backend;
use burn::tensor::{
    DType, Tensor,
    activation::{sigmoid, softmax},
};

use crate::Scores;
use crate::attention::{BLOCK, masked};

/// A norm `(weight + offset) c / sqrt(mean(c²) + eps)` of a row, where `c` is the row, or the row less its mean.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct NormOptions {
    /// Added to the mean square.
    pub eps: f64,
    /// Added to the weights.
    pub offset: f64,
    /// True if the row's mean is taken off first.
    pub centred: bool,
}

/// See [`Engine::attention_backward`](crate::Engine::attention_backward). In blocks of queries, as the attention.
pub(crate) fn attention_backward<B: Backend>(
    [q, k, v]: [Tensor<B, 4>; 3],
    d_out: Tensor<B, 3>,
    scores: Scores,
) -> [Tensor<B, 4>; 3] {
    let [windows, seq, heads, dim] = q.dims();
    let kv_heads = k.dims()[2];
    let (lanes, shared) = (windows * kv_heads, heads / kv_heads);
    let (device, dtype) = (q.device(), q.dtype());
    let scale = scores.scale(dim);
    // [windows, seq, heads, dim] -> [lanes, shared, seq, dim], as in the attention.
    let split = |x: Tensor<B, 4>, per: usize| {
        let x = x.cast(DType::F32).swap_dims(1, 2);
        x.reshape([lanes, per, seq, dim])
    };
    let d_out = split(d_out.reshape([windows, seq, heads, dim]), shared);
    let (q, k, v) = (split(q, shared), split(k, 1), split(v, 1));
    let mut d_q = Vec::with_capacity(seq.div_ceil(BLOCK));
    let [mut d_k, mut d_v] =
        [(); 2].map(|()| Tensor::<B, 4>::zeros([lanes, 1, seq, dim], (&device, DType::F32)));
    for start in (0..seq).step_by(BLOCK) {
        let end = (start + BLOCK).min(seq);
        let first = scores.first_key(start);
        let asked = |x: &Tensor<B, 4>| x.clone().slice([0..lanes, 0..shared, start..end]);
        let seen = |x: &Tensor<B, 4>| x.clone().slice([0..lanes, 0..1, first..end]);
        let (q, d_out, k, v) = (asked(&q), asked(&d_out), seen(&k), seen(&v));
        let products = q.clone().matmul(k.clone().swap_dims(2, 3)) * scale;
        let (products, slope) = match scores.softcap {
            None => (products, None),
            Some(cap) => {
                let bounded = (products / cap).tanh();
                let slope = (bounded.clone() * bounded.clone()).neg() + 1.0;
                (bounded * cap, Some(slope))
            }
        };
        let weights = softmax(masked(products, [start, first], scores, &device), 3);
        let d_weights = d_out.clone().matmul(v.swap_dims(2, 3));
        let mean = (weights.clone() * d_weights.clone()).sum_dim(3);
        let d_scores = weights.clone() * (d_weights - mean) * scale;
        let d_scores = match slope {
            None => d_scores,
            Some(slope) => d_scores * slope,
        };
        d_q.push(d_scores.clone().matmul(k));
        // Query heads that share a key head are rows of one product with it.
        let rows = |x: Tensor<B, 4>| {
            let width = x.dims()[3];
            x.reshape([lanes, 1, shared * (end - start), width])
        };
        let add = |sum: Tensor<B, 4>, by: Tensor<B, 4>, x: Tensor<B, 4>| {
            let own = [0..lanes, 0..1, first..end];
            let part = rows(by).swap_dims(2, 3).matmul(rows(x));
            let part = sum.clone().slice(own.clone()) + part;
            sum.slice_assign(own, part)
        };
        d_k = add(d_k, d_scores, q);
        d_v = add(d_v, weights, d_out);
    }
    let joined = |x: Tensor<B, 4>, heads: usize| {
        let x = x.reshape([windows, heads, seq, dim]);
        x.swap_dims(1, 2).cast(dtype)
    };
    let d_q = joined(Tensor::cat(d_q, 2), heads);
    [d_q, joined(d_k, kv_heads), joined(d_v, kv_heads)]
}

/// See [`Engine::norm_backward`](crate::Engine::norm_backward).
pub(crate) fn norm_backward<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    dy: Tensor<B, 2>,
    norm: NormOptions,
) -> Tensor<B, 2> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let weight = weight.cast(DType::F32).add_scalar(norm.offset);
    let gradient = dy.cast(DType::F32) * weight.unsqueeze();
    let (x, gradient) = match norm.centred {
        false => (x, gradient),
        // The mean of n is 0, so that taking the gradient's mean off before is taking it off after.
        true => (
            x.clone() - x.mean_dim(1),
            gradient.clone() - gradient.mean_dim(1),
        ),
    };
    let square = (x.clone() * x.clone()).mean_dim(1);
    let factor = square.add_scalar(norm.eps).sqrt().recip();
    let normal = x * factor.clone();
    let along = (normal.clone() * gradient.clone()).mean_dim(1);
    ((gradient - normal * along) * factor).cast(dtype)
}

/// See [`Engine::swiglu_backward`](crate::Engine::swiglu_backward): `silu'(x) = σ(x) (1 + x (1 - σ(x)))`.
pub(crate) fn swiglu_backward<B: Backend>(
    gate: Tensor<B, 2>,
    up: Tensor<B, 2>,
    dy: Tensor<B, 2>,
) -> [Tensor<B, 2>; 2] {
    let x = gate.cast(DType::F32);
    let open = sigmoid(x.clone());
    let bend = x.clone() * (open.clone().neg() + 1.0);
    let slope = open.clone() * (bend + 1.0);
    gate_backward(x * open, slope, up, dy)
}

/// See [`Engine::geglu_backward`](crate::Engine::geglu_backward): `gelu(x) = x σ(u)`, `u = sqrt(8 / π) (x + 0.044715
/// x³)`, `gelu'(x) = σ(u) (1 + x (1 - σ(u)) u')`.
pub(crate) fn geglu_backward<B: Backend>(
    gate: Tensor<B, 2>,
    up: Tensor<B, 2>,
    dy: Tensor<B, 2>,
) -> [Tensor<B, 2>; 2] {
    let x = gate.cast(DType::F32);
    let root = (8.0 / std::f64::consts::PI).sqrt();
    let square = x.clone() * x.clone() * 0.044_715;
    let open = sigmoid(x.clone() * (square.clone() + 1.0) * root);
    let inner = (square * 3.0 + 1.0) * root;
    let bend = x.clone() * (open.clone().neg() + 1.0) * inner;
    let slope = open.clone() * (bend + 1.0);
    gate_backward(x * open, slope, up, dy)
}

/// The gradients of `activated * up`, where the activation has this slope; both in f32.
fn gate_backward<B: Backend>(
    activated: Tensor<B, 2>,
    slope: Tensor<B, 2>,
    up: Tensor<B, 2>,
    dy: Tensor<B, 2>,
) -> [Tensor<B, 2>; 2] {
    let dtype = up.dtype();
    let dy = dy.cast(DType::F32);
    let d_gate = dy.clone() * up.cast(DType::F32) * slope;
    [d_gate, dy * activated].map(|it| it.cast(dtype))
}

#[cfg(test)]
mod tests;
