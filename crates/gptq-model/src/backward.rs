//! The gradients of a loss on a block's output with respect to its weights, by its operations in reverse.
//!
//! With `dr` the gradient of a register `r`, the sum over all that read it:
//!
//! ```text
//! residual += scale r     dr = scale d_residual
//! y_i = x W_iᵀ + b_i      dx = Σ dy_i W_i, dW_i = dy_iᵀ x
//! norm, gate, attention   as `Engine` has them; the rotation's is the rotation by the opposite angle
//! x cut into parts        dx = the parts' joined again
//! ```
//!
//! An operation before which no linear stands has no part in this.

use std::collections::{BTreeMap, BTreeSet};

use burn::tensor::Tensor;
use gptq_kernels::{Engine, NormOptions};
use gptq_spec::{Activation, BlockSpec, Norm, NormKind, Op, Register, Route};

use crate::rope::Tables;
use crate::{Flow, Linear, attend};

/// The parts of a block that its reverse pass reads.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a, B: Engine> {
    pub(crate) spec: &'a BlockSpec,
    pub(crate) linears: &'a [Linear<B>],
    pub(crate) vectors: &'a [Tensor<B, 1>],
    pub(crate) rope: &'a Tables<B>,
}

/// Tensors of an operation that its reverse pass needs.
enum Kept<B: Engine> {
    Nothing,
    /// Its input.
    Input(Tensor<B, 2>),
    /// Gate and up.
    Gate([Tensor<B, 2>; 2]),
    /// Values of an attention that has not run yet.
    Values(Tensor<B, 2>),
    /// Rotated queries and keys, and values: `[windows, seq, heads, dim]`.
    Rotated([Tensor<B, 4>; 3]),
}

/// The record of a forward pass.
pub(crate) struct Tape<B: Engine> {
    /// For each operation, and whether a linear stands before its input.
    steps: Vec<(Kept<B>, bool)>,
    /// Registers before which a linear stands.
    moved: BTreeSet<Register>,
}

impl<B: Engine> Default for Tape<B> {
    fn default() -> Self {
        Tape {
            steps: Vec::new(),
            moved: BTreeSet::new(),
        }
    }
}

/// The gradients of registers, as far as their readers have been run in reverse.
struct Gradients<B: Engine>(BTreeMap<Register, Tensor<B, 2>>);

impl<B: Engine> Gradients<B> {
    fn add(&mut self, register: Register, gradient: Tensor<B, 2>) {
        let sum = match self.0.remove(&register) {
            Some(sum) => sum + gradient,
            None => gradient,
        };
        self.0.insert(register, sum);
    }

    /// Removes the complete gradient of a register, when the operation that wrote it is run in reverse.
    fn take(&mut self, register: Register) -> Tensor<B, 2> {
        let gradient = self.0.remove(&register);
        gradient.expect("a later operation read it")
    }
}

impl<B: Engine> Tape<B> {
    /// Keeps the inputs of the next operation, which is about to run on `flow`.
    pub(crate) fn record(&mut self, op: &Op, flow: &Flow<B>) {
        let read = |register: Register| {
            let states = flow.register(register);
            states.expect("an earlier operation wrote it")
        };
        let kept = match op {
            Op::Norm { from, .. } | Op::Linears { from, .. } => Kept::Input(read(*from)),
            Op::Gate { gate, up, .. } => Kept::Gate([*gate, *up].map(read)),
            Op::Attend(attention) => Kept::Values(read(attention.qkv[2])),
            Op::Split { .. } | Op::Add { .. } => Kept::Nothing,
            Op::Route(_) | Op::Dispatch { .. } | Op::Combine { .. } | Op::Weigh { .. } => {
                unreachable!("blocks with experts are not tuned")
            }
        };
        let (from, to) = registers(op);
        let depends = from.iter().any(|register| self.moved.contains(register));
        if depends || matches!(op, Op::Linears { .. }) {
            self.moved.extend(to);
        }
        self.steps.push((kept, depends));
    }

    /// Keeps the rotated queries and keys of the attention that was recorded last.
    pub(crate) fn record_rotated(&mut self, q: Tensor<B, 4>, k: Tensor<B, 4>) {
        let (kept, _) = self.steps.last_mut().expect("the attention was recorded");
        if let Kept::Values(v) = kept {
            let v = v.clone().reshape(k.dims());
            *kept = Kept::Rotated([q, k, v]);
        }
    }

    /// Returns the gradient of every linear's weight, for that of the residual stream at the block's end.
    pub(crate) fn reverse(self, block: Parts<'_, B>, end: Tensor<B, 2>) -> Vec<Tensor<B, 2>> {
        let mut gradients = Gradients(BTreeMap::from([(Register::RESIDUAL, end)]));
        let mut weights: Vec<_> = block.linears.iter().map(|_| None).collect();
        for (op, (kept, depends)) in block.spec.ops().iter().zip(self.steps).rev() {
            match op {
                Op::Linears { from, outputs } => {
                    let Kept::Input(x) = kept else {
                        unreachable!("its input was kept")
                    };
                    for &(linear, to) in outputs.iter().rev() {
                        let dy = gradients.take(to);
                        weights[linear] = Some(B::matmul_tn(dy.clone(), x.clone()));
                        if depends {
                            let weight = block.linears[linear].weight.dense(dy.dtype());
                            gradients.add(*from, B::matmul_nn(dy, weight));
                        }
                    }
                }
                op if depends => block.reverse(op, kept, &mut gradients),
                _ => {}
            }
        }
        let weights = weights.into_iter();
        weights
            .map(|weight| weight.expect("an operation ran it"))
            .collect()
    }
}

impl<B: Engine> Parts<'_, B> {
    /// Passes the gradients of what an operation other than linears has written on to what it read.
    fn reverse(&self, op: &Op, kept: Kept<B>, gradients: &mut Gradients<B>) {
        match (op, kept) {
            (
                Op::Norm {
                    vector,
                    norm,
                    from,
                    to,
                },
                Kept::Input(x),
            ) => {
                let weight = self.vectors[*vector].clone();
                let dx = norm_gradient(x, weight, *norm, gradients.take(*to));
                gradients.add(*from, dx);
            }
            (Op::Split { from, to }, _) => {
                let parts = to.iter().map(|&to| gradients.take(to)).collect();
                gradients.add(*from, Tensor::cat(parts, 1));
            }
            (Op::Attend(attention), Kept::Rotated(rotated)) => {
                let d_out = gradients.take(attention.to);
                let qkv = attend::gradients(self.rope, attention, rotated, d_out);
                for (register, gradient) in attention.qkv.into_iter().zip(qkv) {
                    gradients.add(register, gradient);
                }
            }
            (Op::Gate { act, gate, up, to }, Kept::Gate([x, y])) => {
                let dy = gradients.take(*to);
                let [d_gate, d_up] = match act {
                    Activation::Silu => B::swiglu_backward(x, y, dy),
                    Activation::GeluTanh => B::geglu_backward(x, y, dy),
                };
                gradients.add(*gate, d_gate);
                gradients.add(*up, d_up);
            }
            (Op::Add { from, scale }, _) => {
                let dy = gradients.0[&Register::RESIDUAL].clone();
                let dy = if *scale == 1.0 { dy } else { dy * *scale };
                gradients.add(*from, dy);
            }
            _ => unreachable!("each keeps its own, and linears are not run in reverse here"),
        }
    }
}

/// The gradient of a norm over runs of a row as long as its weights, with respect to `x`.
pub(crate) fn norm_gradient<B: Engine>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    norm: Norm,
    dy: Tensor<B, 2>,
) -> Tensor<B, 2> {
    let ([tokens, features], [len]) = (x.dims(), weight.dims());
    let runs = [tokens * (features / len), len];
    let (offset, centred) = match norm.kind {
        NormKind::Rms | NormKind::RmsF32 => (0.0, false),
        NormKind::RmsPlusOne => (1.0, false),
        NormKind::Layer => (0.0, true),
    };
    let options = NormOptions {
        eps: norm.eps,
        offset,
        centred,
    };
    let dx = B::norm_backward(x.reshape(runs), weight, dy.reshape(runs), options);
    dx.reshape([tokens, features])
}

/// The registers that an operation reads, and those that it writes.
fn registers(op: &Op) -> (Vec<Register>, Vec<Register>) {
    match op {
        Op::Norm { from, to, .. } => (vec![*from], vec![*to]),
        Op::Linears { from, outputs } => (vec![*from], outputs.iter().map(|(_, to)| *to).collect()),
        Op::Split { from, to } => (vec![*from], to.clone()),
        Op::Attend(attention) => (attention.qkv.to_vec(), vec![attention.to]),
        Op::Gate { gate, up, to, .. } => (vec![*gate, *up], vec![*to]),
        Op::Add { from, .. } => (vec![*from], vec![Register::RESIDUAL]),
        Op::Route(Route { from, to, .. }) => (vec![*from], vec![*to]),
        Op::Dispatch { from, to, .. } => (vec![*from], to.clone()),
        Op::Combine { from, to, .. } | Op::Weigh { from, to, .. } => (vec![*from], vec![*to]),
    }
}

#[cfg(test)]
mod tests;
