//! Progress of one branch.

use gptq_plan::{BlockReport, BranchBlock, Clamped, LinearReport};

/// A branch's report as it grows, block by block.
#[derive(Clone, Default)]
pub(crate) struct BranchProgress {
    pub(crate) linears: Vec<LinearReport>,
    pub(crate) clamped: Vec<Clamped>,
    pub(crate) blocks: Vec<BlockReport>,
    /// Tokens of each expert of the block that the branch is in, as far as they are counted.
    pub(crate) expert_tokens: Vec<usize>,
    /// Spent on the branch, by this run and the interrupted ones before it.
    pub(crate) seconds: f64,
}

impl BranchProgress {
    /// The branch's part of block `layer`, for the journal.
    pub(crate) fn block(&self, layer: usize) -> BranchBlock {
        let linears = self.linears.iter().filter(|it| it.layer == layer);
        let clamped = self.clamped.iter().filter(|it| it.layer == layer);
        let block = self.blocks.iter().find(|it| it.layer == layer);
        BranchBlock {
            seconds: self.seconds,
            linears: linears.cloned().collect(),
            clamped: clamped.cloned().collect(),
            output_error: block.map(|block| block.output_error),
            tuning: block.and_then(|block| block.tuning.clone()),
            expert_tokens: block.map_or_else(Vec::new, |block| block.expert_tokens.clone()),
        }
    }
}
