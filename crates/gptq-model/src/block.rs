//! A decoder block on a device: the interpreter of its [`BlockSpec`].
//!
//! ```text
//! input(tap)     the tensor that the tap's linears are given
//! advance(taps)  from before the first of these taps to before the tap after the last
//! ```
//!
//! The operations in reverse are in `backward.rs`.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{Tensor, activation::sigmoid};
use gptq_kernels::{Engine, Routed};
use gptq_spec::{Activation, BlockSpec, Norm, NormKind, Op, Register, Route};

use crate::attend::{attend, attend_stretches};
use crate::backward::{Parts, Tape};
use crate::experts::{BlockMatrix, ExpertLinears, ExpertOutputs, route};
use crate::{Cache, ExpertInputs, Flow, Linear, StretchLayout, Weight, rope};

/// A tensor that comes up inside a block, as [`Block::observed`] shows it.
#[derive(Clone, Debug)]
pub enum Seen<B: Engine> {
    /// The output `[tokens, out_features]` of a linear, with the linear's index in the spec.
    Output(usize, Tensor<B, 2>),
    /// The outputs of a linear of every expert, for the tokens it is chosen for.
    Experts(ExpertOutputs<B>),
    /// Rotated queries `[windows, seq, heads, dim]` and keys `[windows, seq, kv_heads, dim]`.
    Rotated(Tensor<B, 4>, Tensor<B, 4>),
    /// The gated activation: `[tokens, features]`.
    Gated(Tensor<B, 2>),
    /// The residual stream: `[tokens, hidden]`.
    Residual(Tensor<B, 2>),
}

/// Tokens before those that a block runs on.
pub(crate) enum Past<'a, B: Engine> {
    /// None: every window begins a text.
    Nothing,
    /// Those in a cache, which gains the window's.
    Cached(&'a mut Cache<B>),
    /// Those in a cache, and stretches of the window itself.
    Stretches(&'a StretchLayout<B>, &'a mut Cache<B>),
}

/// A block's weights on the device. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Block<B: Engine> {
    pub(crate) spec: Arc<BlockSpec>,
    /// Linears, in the order of the spec's.
    pub(crate) linears: Vec<Linear<B>>,
    /// Vectors, in the order of the spec's.
    pub(crate) vectors: Vec<Tensor<B, 1>>,
    /// Matrices, in the order of the spec's.
    pub(crate) matrices: Vec<BlockMatrix<B>>,
    pub(crate) rope: rope::Tables<B>,
}

impl<B: Engine> Block<B> {
    /// Returns the description of the block.
    pub fn spec(&self) -> &BlockSpec {
        &self.spec
    }

    /// A linear by its index in the spec.
    pub fn linear(&self, linear: usize) -> &Linear<B> {
        &self.linears[linear]
    }

    /// Replaces a linear's weights, keeping its bias.
    pub fn set_weight(&mut self, linear: usize, weight: Tensor<B, 2>) {
        self.linears[linear].weight = Weight::Dense(weight);
    }

    /// The input of the linears of `tap`, `[tokens, in_features]`.
    pub fn input(&self, tap: usize, flow: &Flow<B>) -> Tensor<B, 2> {
        let tap = self.spec.tap(tap);
        let mut flow = self.run(tap.start..tap.at, flow.clone(), Past::Nothing, &mut |_| ());
        self.read(&mut flow, tap.from, tap.at)
    }

    /// Runs the linears of `taps` and what stands between them, up to the next tap.
    pub fn advance(&self, taps: Range<usize>, flow: Flow<B>) -> Flow<B> {
        self.run(self.spec.ops_of(taps), flow, Past::Nothing, &mut |_| ())
    }

    /// Does the same as [`Block::advance`] with this choice of experts.
    pub fn advance_by(
        &self,
        taps: Range<usize>,
        mut flow: Flow<B>,
        routed: Arc<Routed>,
    ) -> Flow<B> {
        let mut routes = taps.clone().filter_map(|tap| self.spec.experts_at(tap));
        let route = routes.next().expect("taps of experts");
        flow.routed.insert(route.to, routed);
        self.advance(taps, flow)
    }

    /// The whole block.
    pub fn forward(&self, flow: Flow<B>) -> Flow<B> {
        self.observed(flow, &mut |_| ())
    }

    /// The whole block, showing `observe` what comes up on the way.
    pub fn observed(&self, flow: Flow<B>, observe: &mut dyn FnMut(Seen<B>)) -> Flow<B> {
        self.run(0..self.spec.ops().len(), flow, Past::Nothing, observe)
    }

    /// The whole block for the tokens that follow those in `cache`, which gains theirs: one window.
    pub fn forward_cached(&self, flow: Flow<B>, cache: &mut Cache<B>) -> Flow<B> {
        let ops = 0..self.spec.ops().len();
        self.run(ops, flow, Past::Cached(cache), &mut |_| ())
    }

    /// The whole block for the stretches of `layout`, whose tokens are the one window of `flow`. `cache` holds the tokens
    /// that the first of them follows, and afterwards those that one after the last may follow.
    pub fn forward_stretches(
        &self,
        flow: Flow<B>,
        layout: &StretchLayout<B>,
        cache: &mut Cache<B>,
    ) -> Flow<B> {
        let ops = 0..self.spec.ops().len();
        self.run(ops, flow, Past::Stretches(layout, cache), &mut |_| ())
    }

    /// Runs the block on `flow`, states at its start in the compute dtype, hands the residual stream at its end
    /// to `loss`, which returns the gradient of the loss with respect to it, in the same shape and dtype, and
    /// returns the gradient of the loss with respect to every linear's weight, f32 `[out, in]`, in the spec's
    /// order. In between gradients have the compute dtype: a loss may have to be scaled.
    pub fn weight_gradients(
        &self,
        mut flow: Flow<B>,
        loss: impl FnOnce(Tensor<B, 2>) -> Tensor<B, 2>,
    ) -> Vec<Tensor<B, 2>> {
        let mut tape = Tape::default();
        for (at, op) in self.spec.ops().iter().enumerate() {
            tape.record(op, &flow);
            flow = self.run(at..at + 1, flow, Past::Nothing, &mut |seen| {
                if let Seen::Rotated(q, k) = seen {
                    tape.record_rotated(q, k);
                }
            });
        }
        let block = Parts {
            spec: &self.spec,
            linears: &self.linears,
            vectors: &self.vectors,
            rope: &self.rope,
        };
        tape.reverse(block, loss(flow.residual))
    }

    /// The inputs of the experts at `tap`, for states before `start`, which is that tap or an earlier one in the same
    /// mixture; by the choice `routed`, or else by the block's own.
    pub fn expert_inputs(
        &self,
        start: usize,
        tap: usize,
        flow: Flow<B>,
        routed: Option<Arc<Routed>>,
    ) -> ExpertInputs<B> {
        let spec = self.spec();
        let position = spec.tap(tap);
        let route = spec.experts_at(tap).expect("a tap of experts");
        let routing = route.to;
        let mut flow = flow;
        if let Some(routed) = routed {
            flow.routed.insert(routing, routed);
        }
        let ops = spec.tap(start).start..position.at;
        let flow = self.run(ops, flow, Past::Nothing, &mut |_| ());
        let states = |register| {
            let states = flow.register(register);
            states.expect("an earlier operation wrote it")
        };
        let x = states(position.from);
        let (tokens, slotted) = match &spec.ops()[position.at] {
            Op::Combine { x, .. } => (states(*x), true),
            _ => (x.clone(), false),
        };
        let routed = flow.routed[&routing].clone();
        let [rows, width] = x.dims();
        ExpertInputs {
            x: match slotted {
                true => x.reshape([rows * routed.top_k(), width / routed.top_k()]),
                false => x,
            },
            tokens,
            slotted,
            routed,
        }
    }

    /// The input of an expert's linears at `tap` for tokens `x [rows, hidden]`, whoever they are given to.
    pub fn expert_input(&self, tap: usize, expert: usize, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let spec = self.spec();
        let Op::Combine { from, .. } = &spec.ops()[spec.tap(tap).at] else {
            return x;
        };
        let gate = spec.ops().iter().find_map(|op| match op {
            Op::Gate { act, gate, up, to } if to == from => Some((*act, *gate, *up)),
            _ => None,
        });
        let (act, gate, up) = gate.expect("slots are gated");
        let linear = |register| {
            let found = spec.ops().iter().find_map(|op| match op {
                Op::Dispatch { linears, to, .. } => {
                    let at = to.iter().position(|it| *it == register)?;
                    Some(linears.start + expert * to.len() + at)
                }
                _ => None,
            });
            self.linear(found.expect("gate and up are experts'"))
        };
        let (gate, up) = (linear(gate).forward(x.clone()), linear(up).forward(x));
        match act {
            Activation::Silu => B::swiglu(gate, up),
            Activation::GeluTanh => B::geglu(gate, up),
        }
    }

    /// Runs the operations `ops`.
    pub(crate) fn run(
        &self,
        ops: Range<usize>,
        mut flow: Flow<B>,
        mut past: Past<'_, B>,
        observe: &mut dyn FnMut(Seen<B>),
    ) -> Flow<B> {
        for at in ops {
            let mut read = |register: Register| self.read(&mut flow, register, at);
            match &self.spec.ops()[at] {
                Op::Norm {
                    vector,
                    norm,
                    from,
                    to,
                } => {
                    let y = self.norm(read(*from), *vector, *norm);
                    flow.activations.insert(*to, y);
                }
                Op::Split { from, to } => {
                    let (x, mut start) = (read(*from), 0);
                    for &to in to {
                        let width = self.spec.width(to);
                        flow.activations
                            .insert(to, x.clone().narrow(1, start, width));
                        start += width;
                    }
                }
                Op::Linears { from, outputs } => {
                    let x = read(*from);
                    for &(linear, to) in outputs {
                        let y = self.linears[linear].forward(x.clone());
                        observe(Seen::Output(linear, y.clone()));
                        flow.activations.insert(to, y);
                    }
                }
                Op::Attend(attention) => {
                    let qkv = attention.qkv.map(read);
                    let mut rotated = |qk: [&Tensor<B, 4>; 2]| {
                        let [q, k] = qk.map(Tensor::clone);
                        observe(Seen::Rotated(q, k));
                    };
                    let (tables, windows) = (&self.rope, flow.windows);
                    let attended = match &mut past {
                        Past::Stretches(layout, cache) => {
                            attend_stretches(tables, attention, qkv, layout, cache)
                        }
                        Past::Cached(cache) => {
                            attend(tables, attention, qkv, windows, Some(cache), &mut rotated)
                        }
                        Past::Nothing => {
                            attend(tables, attention, qkv, windows, None, &mut rotated)
                        }
                    };
                    flow.activations.insert(attention.to, attended);
                }
                Op::Gate { act, gate, up, to } => {
                    let (gate, up) = (read(*gate), read(*up));
                    let y = match act {
                        Activation::Silu => B::swiglu(gate, up),
                        Activation::GeluTanh => B::geglu(gate, up),
                    };
                    observe(Seen::Gated(y.clone()));
                    flow.activations.insert(*to, y);
                }
                Op::Route(Route {
                    router,
                    from,
                    to,
                    how,
                }) => {
                    let x = read(*from);
                    // Where a choice is given, it stays.
                    flow.routed
                        .entry(*to)
                        .or_insert_with(|| Arc::new(route(x, &self.matrices[*router], how)));
                }
                Op::Dispatch {
                    from,
                    routing,
                    linears,
                    to,
                } => {
                    let x = read(*from);
                    let routed = self.routed(&mut flow, *routing, at);
                    let experts = self.experts(linears);
                    let slots = experts.dispatch(x, &routed, &mut |it| observe(Seen::Experts(it)));
                    flow.activations.extend(to.iter().copied().zip(slots));
                }
                Op::Combine {
                    from,
                    x,
                    routing,
                    linears,
                    to,
                } => {
                    read(*x);
                    let x = read(*from);
                    let routed = self.routed(&mut flow, *routing, at);
                    let experts = self.experts(linears);
                    let y = experts.combine(x, &routed, &mut |it| observe(Seen::Experts(it)));
                    flow.activations.insert(*to, y);
                }
                Op::Weigh {
                    from,
                    x,
                    matrix,
                    to,
                } => {
                    let (y, x) = (read(*from), read(*x));
                    let factor = B::matmul_nt(x, self.matrices[*matrix].weight.clone());
                    flow.activations.insert(*to, y * sigmoid(factor));
                }
                Op::Add { from, scale } => {
                    let y = read(*from);
                    let y = if *scale == 1.0 { y } else { y * *scale };
                    flow.residual = flow.residual + y;
                    observe(Seen::Residual(flow.residual.clone()));
                }
            }
        }
        flow
    }

    /// The tensor in a register, for operation `at`; the last that reads it takes it out.
    fn read(&self, flow: &mut Flow<B>, register: Register, at: usize) -> Tensor<B, 2> {
        let states = if register == Register::RESIDUAL || self.spec.is_read(register, at + 1) {
            flow.register(register)
        } else {
            flow.activations.remove(&register)
        };
        states.expect("an earlier operation wrote it")
    }

    /// The choice of experts in a register, for operation `at`; the last that reads it takes it out.
    fn routed(&self, flow: &mut Flow<B>, register: Register, at: usize) -> Arc<Routed> {
        let routed = match self.spec.is_read(register, at + 1) {
            true => flow.routed.get(&register).cloned(),
            false => flow.routed.remove(&register),
        };
        routed.expect("an earlier operation chose")
    }

    /// The linears `linears` of experts.
    fn experts(&self, linears: &Range<usize>) -> ExpertLinears<'_, B> {
        ExpertLinears {
            experts: self.spec.inputs(self.spec.linears()[linears.start].tap),
            linears: &self.linears[linears.clone()],
            first: linears.start,
        }
    }

    fn norm(&self, x: Tensor<B, 2>, vector: usize, norm: Norm) -> Tensor<B, 2> {
        let weight = self.vectors[vector].clone();
        let ([tokens, features], [len]) = (x.dims(), weight.dims());
        if features == len {
            return normalized(x, weight, norm);
        }
        let runs = x.reshape([tokens * (features / len), len]);
        normalized(runs, weight, norm).reshape([tokens, features])
    }
}

/// The norm of each row of `x [rows, len]` with `weight [len]`.
pub(crate) fn normalized<B: Engine>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    norm: Norm,
) -> Tensor<B, 2> {
    match norm.kind {
        NormKind::Rms => B::rms_norm(x, weight, norm.eps),
        NormKind::RmsF32 => B::rms_norm_f32(x, weight, norm.eps, 0.0),
        NormKind::RmsPlusOne => B::rms_norm_f32(x, weight, norm.eps, 1.0),
        NormKind::Layer => B::centred_norm(x, weight, norm.eps),
    }
}

#[cfg(test)]
mod tests;
