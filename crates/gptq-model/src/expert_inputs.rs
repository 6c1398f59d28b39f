//! Inputs of experts' linears at a tap, expert by expert.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;
use gptq_kernels::{Engine, Routed, Slots};

use crate::experts::indices;

/// Inputs of the linears of all experts, for some tokens.
pub struct ExpertInputs<B: Engine> {
    pub(crate) routed: Arc<Routed>,
    pub(crate) slots: Slots,
    /// `[tokens, in]` where experts are given tokens, `[slots, in]` where they are given what they made of them.
    pub(crate) x: Tensor<B, 2>,
    /// `[tokens, hidden]`, what the first linears of any expert would be given.
    pub(crate) tokens: Tensor<B, 2>,
    /// True if `x` has a row for each slot.
    pub(crate) slotted: bool,
}

impl<B: Engine> ExpertInputs<B> {
    /// Returns the choice of experts.
    pub fn routed(&self) -> &Arc<Routed> {
        &self.routed
    }

    /// Returns the slots of an expert, in the order of its rows.
    pub fn slots(&self, expert: usize) -> &[u32] {
        self.slots.of(expert)
    }

    /// Returns the rows of some experts, `[slots, in]`, one expert after the other.
    pub fn of(&self, experts: Range<usize>) -> Tensor<B, 2> {
        let slots = self.slots.starts[experts.start]..self.slots.starts[experts.end];
        let rows = self.slots.order[slots]
            .iter()
            .map(|&slot| match self.slotted {
                true => slot,
                false => slot / self.routed.top_k() as u32,
            });
        B::embed(indices(rows, &self.x.device()), self.x.clone())
    }

    /// Returns every `step`-th token from `first` on, as the first linears of any expert would be given it; `None` if
    /// there is none.
    pub fn every(&self, first: usize, step: usize) -> Option<Tensor<B, 2>> {
        let all = self.tokens.dims()[0];
        let rows = (first..all).step_by(step).map(|row| row as u32);
        let rows = indices(rows, &self.tokens.device());
        (first < all).then(|| B::embed(rows, self.tokens.clone()))
    }
}
