//! The calibration windows' hidden states on their way through the blocks, and the branches that
//! still share them.
//!
//! All branches begin on one stream. It splits when its branches first differ: at the first solved
//! stage of block 0, where each branch goes on with its own quantised weights. With dense
//! propagation it never splits.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, HostBuffer, map_lanes};
use gptq_model::{Block, Flow, ModelConfig, Stage};

use crate::hidden_range::{self, Overflow};
use crate::profile::{Clock, Phase, timed};

/// Hidden states between stages are kept in this type: half the memory, and its rounding is far below
/// the quantisation's error.
const KEEP: DType = DType::F16;

/// Hidden states, in chunks of windows, and the indices of the branches they belong to.
#[derive(Clone)]
pub(crate) struct Stream<B: Engine> {
    chunks: Vec<Chunk<B>>,
    pub(crate) branches: Vec<usize>,
    /// What lies beyond f16's range is brought back into it.
    clamp: bool,
}

/// One chunk's states, where they are kept between stages.
#[derive(Clone)]
enum Chunk<B: Engine> {
    Device(Flow<B>),
    Host {
        windows: usize,
        residual: HostStates,
        activation: Option<HostStates>,
    },
}

/// `[tokens, features]` on the host, in [`KEEP`].
#[derive(Clone)]
struct HostStates {
    values: Arc<HostBuffer>,
    shape: [usize; 2],
}

impl HostStates {
    fn new<B: Engine>(states: Tensor<B, 2>) -> Self {
        HostStates {
            shape: states.dims(),
            values: Arc::new(B::download(states.cast(KEEP))),
        }
    }

    /// On the device, in compute dtype.
    fn upload<B: Engine>(&self, device: &B::Device) -> Tensor<B, 2> {
        B::upload(&self.values, 0, self.shape, device).cast(B::COMPUTE)
    }
}

impl<B: Engine> Chunk<B> {
    /// Keeps `flow` on the host. `old` is what it came from, whose residual may still serve.
    fn on_host(flow: Flow<B>, residual: Option<HostStates>) -> Self {
        Chunk::Host {
            windows: flow.windows,
            residual: residual.unwrap_or_else(|| HostStates::new(flow.residual)),
            activation: flow.activation.map(HostStates::new),
        }
    }

    /// What a stage that takes the activation as it is would be given: nothing else need be brought
    /// to the device for its Gram matrix.
    fn kept_input(&self, stages: &[Stage], device: &B::Device) -> Option<Tensor<B, 2>> {
        if stages.len() > 1 || !stages[0].ends_in_residual() {
            return None;
        }
        match self {
            Chunk::Device(flow) => Some(flow.activation.clone()?.cast(B::COMPUTE)),
            Chunk::Host { activation, .. } => Some(activation.as_ref()?.upload(device)),
        }
    }

    /// The states in compute dtype on `device`.
    fn flow(&self, device: &B::Device) -> Flow<B> {
        match self {
            Chunk::Device(flow) => flow.clone().cast(B::COMPUTE),
            Chunk::Host {
                windows,
                residual,
                activation,
            } => Flow {
                windows: *windows,
                residual: residual.upload(device),
                activation: activation.as_ref().map(|states| states.upload(device)),
            },
        }
    }

    /// Runs `stages`; with `clamp`, brings what comes of them into f16's range. Also how many values
    /// that took.
    fn advance(
        self,
        block: &Block<B>,
        stages: &[Stage],
        device: &B::Device,
        clamp: bool,
    ) -> (Self, usize) {
        // Stages that end in an activation leave the residual as it was.
        let ends_inside = stages.len() == 1 && !stages[0].ends_in_residual();
        let (flow, kept) = match self {
            Chunk::Device(flow) => (flow.cast(B::COMPUTE), None),
            Chunk::Host { ref residual, .. } => {
                let kept = ends_inside.then(|| residual.clone());
                (self.flow(device), Some(kept))
            }
        };
        let end = stages
            .iter()
            .fold(flow, |flow, &stage| block.advance(stage, flow));
        let (end, clamped) = match clamp {
            true => hidden_range::clamp(end),
            false => (end, 0),
        };
        let chunk = match kept {
            None => Chunk::Device(end.cast(KEEP)),
            Some(residual) => Chunk::on_host(end, residual),
        };
        (chunk, clamped)
    }
}

impl<B: Engine> Stream<B> {
    /// The first `resident` chunks stay on the device.
    pub(crate) fn new(
        flows: Vec<Flow<B>>,
        branches: Vec<usize>,
        resident: usize,
        clamp: bool,
    ) -> Self {
        let keep = |(i, flow): (usize, Flow<B>)| match i < resident {
            true => Chunk::Device(flow.cast(KEEP)),
            false => Chunk::on_host(flow, None),
        };
        Stream {
            chunks: flows.into_iter().enumerate().map(keep).collect(),
            branches,
            clamp,
        }
    }

    /// What of the states is not finite, for explaining a failure.
    pub(crate) fn not_finite(&self, device: &B::Device) -> Option<Overflow> {
        hidden_range::search(self.chunks.iter().map(|chunk| chunk.flow(device)))
    }

    /// The Gram matrix `XᵀX` of each stage's input, with `block`'s weights in between; the stream
    /// stays where it is.
    pub(crate) fn grams(
        &self,
        block: &Block<B>,
        stages: &[Stage],
        config: &ModelConfig,
        device: &B::Device,
        clock: &mut Clock,
    ) -> Vec<Tensor<B, 2>> {
        let started = Instant::now();
        let wait = clock.waits();
        let lane = self.chunks.len().div_ceil(B::LANES);
        let lanes = map_lanes::<B, _, _>(self.chunks.chunks(lane).collect(), |chunks| {
            lane_grams(chunks, block, stages, config, device, wait)
        });
        let [forward, gram] = lanes
            .iter()
            .fold([0.0; 2], |[f, g], lane| [f + lane.forward, g + lane.gram]);
        let grams = lanes
            .into_iter()
            .map(|lane| lane.grams)
            .reduce(|sum, lane| sum.into_iter().zip(lane).map(|(a, b)| a + b).collect())
            .expect("a stream has at least one chunk");
        // Lanes run at the same time: their shares of it, not their sums.
        let seconds = started.elapsed().as_secs_f64();
        let share = forward / (forward + gram).max(f64::MIN_POSITIVE);
        clock.add(Phase::Forward, seconds * share);
        clock.add(Phase::Gram, seconds * (1.0 - share));
        grams
    }

    /// Runs `stages` with `block`'s weights. Also how many values were clamped.
    pub(crate) fn advance(
        self,
        block: &Block<B>,
        stages: &[Stage],
        device: &B::Device,
        clock: &mut Clock,
    ) -> (Self, usize) {
        let clamp = self.clamp;
        let advanced = clock.measure::<B, _>(Phase::Forward, device, || {
            map_lanes::<B, _, _>(self.chunks, |chunk| {
                chunk.advance(block, stages, device, clamp)
            })
        });
        let (chunks, clamped): (Vec<_>, Vec<usize>) = advanced.into_iter().unzip();
        let stream = Stream {
            chunks,
            branches: self.branches,
            clamp,
        };
        (stream, clamped.iter().sum())
    }
}

/// What a lane found, and the seconds it took.
struct Lane<B: Engine> {
    grams: Vec<Tensor<B, 2>>,
    forward: f64,
    gram: f64,
}

/// [`Stream::grams`] over some of the chunks.
fn lane_grams<B: Engine>(
    chunks: &[Chunk<B>],
    block: &Block<B>,
    stages: &[Stage],
    config: &ModelConfig,
    device: &B::Device,
    wait: bool,
) -> Lane<B> {
    let mut grams: Vec<Option<Tensor<B, 2>>> = stages
        .iter()
        .map(|stage| Some(B::gram_zeros(stage.in_features(config), device)))
        .collect();
    let (mut forward, mut gram) = (0.0, 0.0);
    for chunk in chunks {
        let (input, seconds) = timed::<B, _>(wait, device, || chunk.kept_input(stages, device));
        forward += seconds;
        if let Some(input) = input {
            gram += accumulate(&mut grams[0], input, wait, device);
            continue;
        }
        let (mut flow, seconds) = timed::<B, _>(wait, device, || chunk.flow(device));
        forward += seconds;
        for (i, &stage) in stages.iter().enumerate() {
            let (input, seconds) = timed::<B, _>(wait, device, || block.input(stage, &flow));
            forward += seconds;
            gram += accumulate(&mut grams[i], input, wait, device);
            if i + 1 < stages.len() {
                let (next, seconds) = timed::<B, _>(wait, device, || block.advance(stage, flow));
                forward += seconds;
                flow = next;
            }
        }
    }
    Lane {
        grams: grams.into_iter().flatten().collect(),
        forward,
        gram,
    }
}

/// Adds `inputᵀ · input` to the sum; the seconds it took.
fn accumulate<B: Engine>(
    sum: &mut Option<Tensor<B, 2>>,
    input: Tensor<B, 2>,
    wait: bool,
    device: &B::Device,
) -> f64 {
    // Taken out, so that the engine owns it alone and can add in place.
    let old = sum.take().expect("put back below");
    let (new, seconds) = timed::<B, _>(wait, device, || B::gram_add(old, input));
    *sum = Some(new);
    seconds
}
