//! Inputs of experts' linears at a tap, expert by expert.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;
use gptq_kernels::{Engine, Routed};

use crate::experts::indices;

/// Inputs of the linears of all experts, for some tokens.
pub struct ExpertInputs<B: Engine> {
    pub(crate) routed: Arc<Routed>,
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
        self.routed.slots().of(expert)
    }

    /// Returns the first row of each of some experts among those of [`ExpertInputs::of`], and in the end their number.
    pub fn starts(&self, experts: Range<usize>) -> Vec<usize> {
        let starts = &self.routed.slots().starts[experts.start..=experts.end];
        starts.iter().map(|start| start - starts[0]).collect()
    }

    /// Returns the rows of some experts, `[slots, in]`, one expert after the other.
    pub fn of(&self, experts: Range<usize>) -> Tensor<B, 2> {
        let top_k = self.routed.top_k() as u32;
        let rows = self
            .slots_of(experts)
            .iter()
            .map(|&slot| match self.slotted {
                true => slot,
                false => slot / top_k,
            });
        B::embed(indices(rows, &self.x.device()), self.x.clone())
    }

    /// Returns the slots of some experts, one expert after the other.
    pub fn slots_of(&self, experts: Range<usize>) -> &[u32] {
        let slots = self.routed.slots();
        &slots.order[slots.starts[experts.start]..slots.starts[experts.end]]
    }

    /// Returns the rows of `states [tokens, features]` of some experts' tokens, one expert after the other.
    pub fn of_tokens(&self, states: &Tensor<B, 2>, experts: Range<usize>) -> Tensor<B, 2> {
        let top_k = self.routed.top_k() as u32;
        let rows = self.slots_of(experts).iter().map(|&slot| slot / top_k);
        B::embed(indices(rows, &states.device()), states.clone())
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
