//! The calibration windows' hidden states on their way through the blocks, and the branches that
//! still share them.
//!
//! All branches begin on one stream. It splits when its branches first differ: at the first solved
//! stage of block 0, where each branch goes on with its own quantised weights. With dense
//! propagation it never splits.

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, map_lanes};
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
    pub(crate) fn grams(
        &self,
        block: &Block<B>,
        stages: &[Stage],
        config: &ModelConfig,
    ) -> Vec<Tensor<B, 2>> {
        let lane = self.flows.len().div_ceil(B::LANES);
        let lanes = map_lanes::<B, _, _>(self.flows.chunks(lane).collect(), |flows| {
            lane_grams(flows, block, stages, config)
        });
        lanes
            .into_iter()
            .reduce(|sum, lane| sum.into_iter().zip(lane).map(|(a, b)| a + b).collect())
            .expect("a stream has at least one chunk")
    }

    /// Runs `stages` with `block`'s weights.
    pub(crate) fn advance(self, block: &Block<B>, stages: &[Stage]) -> Self {
        let flows = map_lanes::<B, _, _>(self.flows, |flow| {
            let start = flow.cast(B::COMPUTE);
            let end = stages
                .iter()
                .fold(start, |flow, &stage| block.advance(stage, flow));
            end.cast(KEEP)
        });
        Stream {
            flows,
            branches: self.branches,
        }
    }
}

/// [`Stream::grams`] over some of the chunks.
fn lane_grams<B: Engine>(
    flows: &[Flow<B>],
    block: &Block<B>,
    stages: &[Stage],
    config: &ModelConfig,
) -> Vec<Tensor<B, 2>> {
    let device = flows[0].residual.device();
    let mut grams: Vec<Option<Tensor<B, 2>>> = stages
        .iter()
        .map(|stage| stage.in_features(config))
        .map(|n| Some(Tensor::zeros([n, n], (&device, DType::F32))))
        .collect();
    for flow in flows {
        let mut flow = flow.clone().cast(B::COMPUTE);
        for (i, &stage) in stages.iter().enumerate() {
            // Taken out, so that the engine owns it alone and can add in place.
            let gram = grams[i].take().expect("put back below");
            grams[i] = Some(B::gram_add(gram, block.input(stage, &flow)));
            if i + 1 < stages.len() {
                flow = block.advance(stage, flow);
            }
        }
    }
    grams.into_iter().flatten().collect()
}
