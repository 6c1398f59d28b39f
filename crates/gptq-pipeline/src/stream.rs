//! The calibration windows' hidden states on their way through the blocks, and the branches that
//! still share them.
//!
//! All branches begin on one stream. It splits when its branches first differ: at the first solved
//! stage of block 0, where each branch goes on with its own quantised weights. With dense
//! propagation it never splits.

use burn::tensor::{DType, Tensor};
use gptq_kernels::Engine;
use gptq_model::{Block, Flow, ModelConfig, Stage};

/// Hidden states between stages are kept in this type; DESIGN's "f16 per branch".
const KEEP: DType = DType::F16;

/// Hidden states, in chunks of windows, and the indices of the branches they belong to.
#[derive(Clone)]
pub(crate) struct Stream<B: Engine> {
    flows: Vec<Flow<B>>,
    pub(crate) branches: Vec<usize>,
}

impl<B: Engine> Stream<B> {
    pub(crate) fn new(flows: Vec<Flow<B>>, branches: Vec<usize>) -> Self {
        let flows = flows.into_iter().map(|flow| flow.cast(KEEP)).collect();
        Stream { flows, branches }
    }

    /// The Gram matrix `XᵀX` of each stage's input, with `block`'s weights in between; the stream
    /// stays where it is.
    pub(crate) fn grams(&self, block: &Block<B>, stages: &[Stage], config: &ModelConfig) -> Vec<Tensor<B, 2>> {
        let device = self.flows[0].residual.device();
        let mut grams: Vec<Tensor<B, 2>> = stages
            .iter()
            .map(|stage| stage.in_features(config))
            .map(|n| Tensor::zeros([n, n], (&device, DType::F32)))
            .collect();
        for flow in &self.flows {
            let mut flow = flow.clone().cast(B::COMPUTE);
            for (i, &stage) in stages.iter().enumerate() {
                let input = block.input(stage, &flow);
                let gram = grams[i].clone();
                // Freed first, so that the sum can be made in place.
                grams[i] = Tensor::empty([1, 1], (&device, DType::F32));
                grams[i] = B::gram_add(gram, input);
                if i + 1 < stages.len() {
                    flow = block.advance(stage, flow);
                }
            }
        }
        grams
    }

    /// Runs `stages` with `block`'s weights.
    pub(crate) fn advance(mut self, block: &Block<B>, stages: &[Stage]) -> Self {
        for flow in &mut self.flows {
            let mut next = flow.clone().cast(B::COMPUTE);
            for &stage in stages {
                next = block.advance(stage, next);
            }
            *flow = next.cast(KEEP);
        }
        self
    }
}
