//! A decoder block as data: its linears, its vectors, and the operations between them.
//!
//! A family (`families/`) describes each block of a model once, with a [`BlockBuilder`](crate::BlockBuilder);
//! `gptq-model`'s `Block` runs the description, and every list of a model's parts is computed from it. There
//! are no tensors here.
//!
//! Operations read and write *registers*, each `[tokens, features]` and written once, but for the residual
//! stream, which enters and leaves the block and which [`Op::Add`] adds to. A *tap* is a point where linears
//! take their common input. Between two taps only the registers that are still read are alive; the cut stands
//! before the norms that a tap's input comes from, because these cost less to run again than to keep.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::experts::{MatrixSpec, Route};
use crate::ops::{Attention, Op};
use crate::register::Register;

/// Prefix of the names of a model's parts, if the language model is the whole model.
pub(crate) const STEM: &str = "model.";

/// A linear layer of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearSpec {
    /// Prefix of the names of the model's parts, such as [`STEM`].
    pub(crate) stem: &'static str,
    /// Module name within the block.
    pub name: String,
    /// Features of the input.
    pub in_features: usize,
    /// Features of the output.
    pub out_features: usize,
    /// True if it has a bias.
    pub bias: bool,
    /// The tap whose input it takes.
    pub tap: usize,
    /// Module name, within the block, under which readers fuse it with its neighbours.
    pub fused_as: Option<String>,
}

impl LinearSpec {
    /// Module name in block `layer` of a checkpoint.
    pub fn module(&self, layer: usize) -> String {
        module(self.stem, layer, &self.name)
    }

    /// `(in_features, out_features)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.in_features, self.out_features)
    }
}

/// Division of a linear among devices that share the heads and the feed-forward of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Division {
    /// Each has some of the outputs.
    Outputs,
    /// Each has the outputs of some key and value heads, or a copy of one.
    KvHeads,
    /// Each has the inputs that it has computed itself.
    Inputs,
}

/// The weights of a norm.
#[derive(Clone, Debug, PartialEq)]
pub struct VectorSpec {
    pub(crate) stem: &'static str,
    /// Module name within the block.
    pub name: String,
    /// Number of weights.
    pub len: usize,
}

impl VectorSpec {
    /// Module name in block `layer` of a checkpoint.
    pub fn module(&self, layer: usize) -> String {
        module(self.stem, layer, &self.name)
    }
}

fn module(stem: &str, layer: usize, name: &str) -> String {
    format!("{stem}layers.{layer}.{name}")
}

/// Position of a tap in a block.
#[derive(Clone, Debug, PartialEq)]
pub struct Tap {
    /// First operation since the cut before it.
    pub start: usize,
    /// The operation that takes its input: [`Op::Linears`], [`Op::Dispatch`] or [`Op::Combine`].
    pub at: usize,
    /// Input.
    pub from: Register,
    /// Indices of its linears.
    pub linears: Range<usize>,
}

/// The description of a decoder block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSpec {
    pub(crate) ops: Vec<Op>,
    pub(crate) linears: Vec<LinearSpec>,
    pub(crate) vectors: Vec<VectorSpec>,
    pub(crate) matrices: Vec<MatrixSpec>,
    pub(crate) taps: Vec<Tap>,
    /// Features by register.
    pub(crate) widths: Vec<usize>,
}

impl BlockSpec {
    /// The same block of a model whose parts' names begin with `stem`.
    pub(crate) fn under(mut self, stem: &'static str) -> Self {
        self.linears.iter_mut().for_each(|it| it.stem = stem);
        self.vectors.iter_mut().for_each(|it| it.stem = stem);
        self.matrices.iter_mut().for_each(|it| it.stem = stem);
        self
    }

    /// Its operations, in order.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Features of a register.
    ///
    /// # Panics
    /// The block has no such register.
    pub fn width(&self, register: Register) -> usize {
        self.widths[register.0]
    }

    /// Returns the position of tap `tap`.
    ///
    /// # Panics
    /// There is no such tap.
    pub fn tap(&self, tap: usize) -> &Tap {
        &self.taps[tap]
    }

    /// Linear layers, in the order in which they run.
    pub fn linears(&self) -> &[LinearSpec] {
        &self.linears
    }

    /// Norm weights, in the order in which they are used.
    pub fn vectors(&self) -> &[VectorSpec] {
        &self.vectors
    }

    /// All taps, in order.
    pub fn taps(&self) -> Range<usize> {
        0..self.taps.len()
    }

    /// The indices of the linears that take the input of `tap`; there is at least one.
    pub fn linears_of(&self, tap: usize) -> Range<usize> {
        self.taps[tap].linears.clone()
    }

    /// Features of a tap's input; of experts, of one's.
    pub fn in_features(&self, tap: usize) -> usize {
        self.linears[self.taps[tap].linears.start].in_features
    }

    /// The register that is the input of `tap` as it is kept, where nothing need be computed for it.
    pub fn kept_input(&self, tap: usize) -> Option<Register> {
        let tap = &self.taps[tap];
        (tap.start == tap.at).then_some(tap.from)
    }

    /// Returns true if anything is added to the residual stream between the first of `taps` and the tap
    /// after them.
    pub fn adds(&self, taps: Range<usize>) -> bool {
        let mut ops = self.ops[self.ops_of(taps)].iter();
        ops.any(|op| matches!(op, Op::Add { .. }))
    }

    /// Returns the factor with which a linear's output is added to the residual stream as it was before the linear's
    /// tap; `None` if the output goes elsewhere, or if something else is added before.
    pub fn added(&self, linear: usize) -> Option<f64> {
        let tap = &self.taps[self.linears[linear].tap];
        let output = match &self.ops[tap.at] {
            Op::Linears { outputs, .. } => &outputs.iter().find(|(at, _)| *at == linear)?.1,
            Op::Combine { to, .. } => to,
            _ => return None,
        };
        let later = self.ops[tap.at + 1..].iter();
        let mut later = later.filter(|op| op.reads(*output) || matches!(op, Op::Add { .. }));
        match later.next()? {
            Op::Add { from, scale } if from == output => Some(*scale),
            _ => None,
        }
    }

    /// Features of all registers but the residual stream that are kept before `tap`.
    pub fn kept_features(&self, tap: usize) -> usize {
        let start = self.taps[tap].start;
        let written = |&register: &usize| {
            let register = Register(register);
            self.ops[..start].iter().any(|op| op.writes(register))
        };
        let registers = (1..self.widths.len()).filter(written);
        registers
            .filter(|&register| self.is_read(Register(register), start))
            .map(|register| self.widths[register])
            .sum()
    }

    /// The taps' linears in a word: the name they are fused under or else the first one's, without what
    /// all have in common ("qkv", "o", "gate_up", "down"), or those of experts ("experts.gate_up", "experts.down").
    pub fn tap_name(&self, tap: usize) -> &str {
        match &self.ops[self.taps[tap].at] {
            Op::Dispatch { .. } => return "experts.gate_up",
            Op::Combine { .. } => return "experts.down",
            _ => {}
        }
        let first = &self.linears[self.taps[tap].linears.start];
        let name = first.fused_as.as_ref().unwrap_or(&first.name);
        let name = name.rsplit('.').next().unwrap_or(name);
        name.strip_suffix("_proj").unwrap_or(name)
    }

    /// Names under which readers fuse some of `linears`, of which none is missing there.
    pub fn fused(&self, linears: &[usize]) -> Vec<&str> {
        // By name, how many linears of the block have it and are not among `linears`.
        let mut missing: BTreeMap<&str, usize> = BTreeMap::new();
        let among: BTreeSet<usize> = linears.iter().copied().collect();
        for (at, linear) in self.linears.iter().enumerate() {
            if let Some(name) = linear.fused_as.as_deref() {
                *missing.entry(name).or_default() += usize::from(!among.contains(&at));
            }
        }
        let names = linears.iter();
        let names = names.filter_map(|&linear| self.linears[linear].fused_as.as_deref());
        // Taken out, so that each is named once.
        names
            .filter(|name| missing.remove(name) == Some(0))
            .collect()
    }

    /// Returns the division of a linear among devices that share the block.
    pub fn division(&self, linear: usize) -> Division {
        if !self.is_whole(self.taps[self.linears[linear].tap].from) {
            return Division::Inputs;
        }
        let mut outputs = Vec::new();
        for op in &self.ops {
            match op {
                Op::Linears { outputs: all, .. } => {
                    let own = all.iter().filter(|(at, _)| *at == linear);
                    outputs.extend(own.map(|(_, to)| *to));
                }
                Op::Norm { from, to, .. } if outputs.contains(from) => outputs.push(*to),
                Op::Split { from, to } if outputs.contains(from) => outputs.extend(to),
                Op::Attend(Attention { qkv: [_, k, v], .. })
                    if outputs.contains(k) || outputs.contains(v) =>
                {
                    return Division::KvHeads;
                }
                _ => {}
            }
        }
        Division::Outputs
    }

    /// Returns true if a register is the residual stream or a norm of it.
    fn is_whole(&self, register: Register) -> bool {
        let source = self.ops.iter().find_map(|op| match op {
            Op::Norm { from, to, .. } if *to == register => Some(*from),
            _ => None,
        });
        register == Register::RESIDUAL || source.is_some_and(|from| self.is_whole(from))
    }

    /// Returns the features of all registers together, the residual stream included.
    pub fn features(&self) -> usize {
        self.widths.iter().sum()
    }

    /// Weights of all linears, without biases.
    pub fn weights(&self) -> u128 {
        let linears = self.linears.iter();
        linears
            .map(|linear| linear.in_features as u128 * linear.out_features as u128)
            .sum()
    }

    /// Parameters: the weights and biases of its linears, and its vectors.
    pub fn parameters(&self) -> u128 {
        let biases = self.linears.iter().filter(|linear| linear.bias);
        let biases: u128 = biases.map(|linear| linear.out_features as u128).sum();
        let vectors: u128 = self.vectors.iter().map(|vector| vector.len as u128).sum();
        let matrix = |it: &MatrixSpec| {
            let [n_out, n_in] = it.shape.map(|n| n as u128);
            n_out * (n_in + u128::from(it.correction))
        };
        let matrices: u128 = self.matrices.iter().map(matrix).sum();
        self.weights() + biases + vectors + matrices
    }

    /// The attention of the block.
    pub fn attention(&self) -> Option<&Attention> {
        self.ops.iter().find_map(|op| match op {
            Op::Attend(attention) => Some(attention),
            _ => None,
        })
    }

    /// Operations from the cut before the first of `taps` to the cut after the last.
    pub fn ops_of(&self, taps: Range<usize>) -> Range<usize> {
        let cut = |tap: usize| self.taps.get(tap).map_or(self.ops.len(), |tap| tap.start);
        cut(taps.start)..cut(taps.end)
    }

    /// Returns true if an operation from `start` on reads a register.
    pub fn is_read(&self, register: Register, start: usize) -> bool {
        self.ops[start..].iter().any(|op| op.reads(register))
    }

    /// Matrices that are not quantized, in the order in which they are used.
    pub fn matrices(&self) -> &[MatrixSpec] {
        &self.matrices
    }

    /// Inputs of the linears of `tap`: one, or one for each expert.
    pub fn inputs(&self, tap: usize) -> usize {
        match self.experts_at(tap) {
            Some(route) => route.how.experts,
            None => 1,
        }
    }

    /// The indices of the linears that take input `input` of `tap`.
    pub fn linears_at(&self, tap: usize, input: usize) -> Range<usize> {
        let all = self.linears_of(tap);
        let each = all.len() / self.inputs(tap);
        let first = all.start + input * each;
        first..first + each
    }

    /// Returns the choice of experts that `tap` goes by, if its linears are experts'.
    pub fn experts_at(&self, tap: usize) -> Option<&Route> {
        match &self.ops()[self.tap(tap).at] {
            Op::Dispatch { routing, .. } | Op::Combine { routing, .. } => self.route(*routing),
            _ => None,
        }
    }

    /// Returns the operation that writes a choice of experts.
    pub fn route(&self, routing: Register) -> Option<&Route> {
        self.ops().iter().find_map(|op| match op {
            Op::Route(route) if route.to == routing => Some(route),
            _ => None,
        })
    }

    /// Returns true if the input of `tap` is given to experts, false if it is what they made of it.
    pub fn dispatches(&self, tap: usize) -> bool {
        matches!(self.ops()[self.tap(tap).at], Op::Dispatch { .. })
    }

    /// Returns the first tap of the mixture that the experts at `tap` belong to.
    pub fn first_of_mixture(&self, tap: usize) -> usize {
        let mut groups = self.settings_groups().into_iter();
        let group = groups.find(|group| group.contains(&tap));
        group.map_or(tap, |group| group.start)
    }

    /// Returns true if a token goes through some of the block's linears only.
    pub fn has_experts(&self) -> bool {
        self.taps().any(|tap| self.experts_at(tap).is_some())
    }

    /// Returns consecutive taps whose linears get their settings together: those of experts, which readers fuse, and
    /// every other by itself.
    pub fn settings_groups(&self) -> Vec<Range<usize>> {
        let mut groups: Vec<Range<usize>> = Vec::new();
        for tap in self.taps() {
            let routing = |tap: usize| self.experts_at(tap).map(|route| route.to);
            match groups.last_mut() {
                Some(last) if routing(tap).is_some() && routing(tap) == routing(last.start) => {
                    last.end = tap + 1;
                }
                _ => groups.push(tap..tap + 1),
            }
        }
        groups
    }
}

#[cfg(test)]
mod tests;
