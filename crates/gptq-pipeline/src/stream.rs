//! The calibration windows' hidden states on their way through the blocks, and the branches that
//! still share them.
//!
//! All branches begin on one stream. It splits when its branches first differ: at the first solved
//! stage of block 0, where each branch goes on with its own quantised weights. With dense
//! propagation it never splits.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{DType, Tensor};
use gptq_format::{FormatError, le_bytes};
use gptq_kernels::{Engine, HostBuffer, map_lanes};
use gptq_model::{Block, Flow, ModelConfig, ModelError, Stage};

use crate::PipelineError;
use crate::memory::Places;
use crate::profile::{Clock, Phase, timed};
use crate::scratch::{Scratch, Slot};

/// Hidden states between stages are kept in this type: half the memory, and its rounding is far below
/// the quantisation's error.
const KEEP: DType = DType::F16;

/// Hidden states, in chunks of windows, and the indices of the branches they belong to.
#[derive(Clone)]
pub(crate) struct Stream<B: Engine> {
    chunks: Vec<Chunk<B>>,
    pub(crate) branches: Vec<usize>,
}

/// One chunk's states, where they are kept between stages.
#[derive(Clone)]
enum Chunk<B: Engine> {
    Device(Flow<B>),
    Host {
        windows: usize,
        residual: HostStates,
        activation: Option<HostStates>,
        /// Where states are put, if not into memory.
        scratch: Option<Arc<Scratch>>,
    },
}

/// `[tokens, features]` on the host, in [`KEEP`].
#[derive(Clone)]
struct HostStates {
    values: Values,
    shape: [usize; 2],
}

#[derive(Clone)]
enum Values {
    Memory(Arc<HostBuffer>),
    Disk(Arc<Slot>),
}

impl HostStates {
    /// Into `scratch`, if there is one, else into memory.
    fn new<B: Engine>(
        states: Tensor<B, 2>,
        scratch: Option<&Arc<Scratch>>,
    ) -> Result<Self, FormatError> {
        let shape = states.dims();
        let values = B::download(states.cast(KEEP));
        let values = match scratch {
            None => Values::Memory(Arc::new(values)),
            Some(scratch) => Values::Disk(Arc::new(scratch.put(&le_bytes(values.values()))?)),
        };
        Ok(HostStates { values, shape })
    }

    /// On the device, in compute dtype.
    fn upload<B: Engine>(&self, device: &B::Device) -> Result<Tensor<B, 2>, FormatError> {
        let upload = |values: &HostBuffer| B::upload(values, 0, self.shape, device);
        let states = match &self.values {
            Values::Memory(values) => upload(values),
            Values::Disk(slot) => {
                let mut values = B::host_buffer(self.shape.iter().product(), device);
                // As they were written, on this machine.
                slot.read(bytemuck::cast_slice_mut(values.values_mut()))?;
                upload(&values)
            }
        };
        Ok(states.cast(B::COMPUTE))
    }
}

impl<B: Engine> Chunk<B> {
    /// Keeps `flow` on the host. `residual` is what it came from, if that still serves.
    fn on_host(
        flow: Flow<B>,
        residual: Option<HostStates>,
        scratch: Option<Arc<Scratch>>,
    ) -> Result<Self, FormatError> {
        let keep = |states| HostStates::new(states, scratch.as_ref());
        Ok(Chunk::Host {
            windows: flow.windows,
            residual: match residual {
                Some(residual) => residual,
                None => keep(flow.residual)?,
            },
            activation: flow.activation.map(keep).transpose()?,
            scratch,
        })
    }

    /// What a stage that takes the activation as it is would be given: nothing else need be brought
    /// to the device for its Gram matrix.
    fn kept_input(
        &self,
        stages: &[Stage],
        device: &B::Device,
    ) -> Result<Option<Tensor<B, 2>>, FormatError> {
        if stages.len() > 1 || !stages[0].ends_in_residual() {
            return Ok(None);
        }
        match self {
            Chunk::Device(flow) => Ok(flow.activation.clone().map(|it| it.cast(B::COMPUTE))),
            Chunk::Host { activation, .. } => {
                let upload = |states: &HostStates| states.upload(device);
                activation.as_ref().map(upload).transpose()
            }
        }
    }

    /// The states in compute dtype on `device`.
    fn flow(&self, device: &B::Device) -> Result<Flow<B>, FormatError> {
        match self {
            Chunk::Device(flow) => Ok(flow.clone().cast(B::COMPUTE)),
            Chunk::Host {
                windows,
                residual,
                activation,
                ..
            } => {
                let upload = |states: &HostStates| states.upload(device);
                Ok(Flow {
                    windows: *windows,
                    residual: upload(residual)?,
                    activation: activation.as_ref().map(upload).transpose()?,
                })
            }
        }
    }

    /// Runs `stages`.
    fn advance(
        self,
        block: &Block<B>,
        stages: &[Stage],
        device: &B::Device,
    ) -> Result<Self, FormatError> {
        // Stages that end in an activation leave the residual as it was.
        let ends_inside = stages.len() == 1 && !stages[0].ends_in_residual();
        let (flow, kept) = match self {
            Chunk::Device(flow) => (flow.cast(B::COMPUTE), None),
            Chunk::Host {
                ref residual,
                ref scratch,
                ..
            } => {
                let residual = ends_inside.then(|| residual.clone());
                (self.flow(device)?, Some((residual, scratch.clone())))
            }
        };
        let end = stages
            .iter()
            .fold(flow, |flow, &stage| block.advance(stage, flow));
        match kept {
            None => Ok(Chunk::Device(end.cast(KEEP))),
            Some((residual, scratch)) => Chunk::on_host(end, residual, scratch),
        }
    }
}

impl<B: Engine> Stream<B> {
    /// Keeps each chunk where it belongs as it comes.
    pub(crate) fn new(
        flows: impl Iterator<Item = Result<Flow<B>, ModelError>>,
        branches: Vec<usize>,
        places: &Places,
        scratch: Option<&Arc<Scratch>>,
    ) -> Result<Self, PipelineError> {
        let keep = |(i, flow): (usize, Result<Flow<B>, ModelError>)| match i {
            i if i < places.device => Ok(Chunk::Device(flow?.cast(KEEP))),
            i if i < places.device + places.host => Ok(Chunk::on_host(flow?, None, None)?),
            _ => Ok(Chunk::on_host(flow?, None, scratch.cloned())?),
        };
        let chunks = flows.enumerate().map(keep);
        Ok(Stream {
            chunks: chunks.collect::<Result<_, PipelineError>>()?,
            branches,
        })
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
    ) -> Result<Vec<Tensor<B, 2>>, FormatError> {
        let started = Instant::now();
        let wait = clock.waits();
        let lane = self.chunks.len().div_ceil(B::LANES);
        let lanes = map_lanes::<B, _, _>(self.chunks.chunks(lane).collect(), |chunks| {
            lane_grams(chunks, block, stages, config, device, wait)
        });
        let lanes = lanes.into_iter().collect::<Result<Vec<_>, FormatError>>()?;
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
        Ok(grams)
    }

    /// Runs `stages` with `block`'s weights.
    pub(crate) fn advance(
        self,
        block: &Block<B>,
        stages: &[Stage],
        device: &B::Device,
        clock: &mut Clock,
    ) -> Result<Self, FormatError> {
        let chunks = clock.measure::<B, _>(Phase::Forward, device, || {
            map_lanes::<B, _, _>(self.chunks, |chunk| chunk.advance(block, stages, device))
        });
        Ok(Stream {
            chunks: chunks.into_iter().collect::<Result<_, FormatError>>()?,
            branches: self.branches,
        })
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
) -> Result<Lane<B>, FormatError> {
    let mut grams: Vec<Option<Tensor<B, 2>>> = stages
        .iter()
        .map(|stage| Some(B::gram_zeros(stage.in_features(config), device)))
        .collect();
    let (mut forward, mut gram) = (0.0, 0.0);
    for chunk in chunks {
        let (input, seconds) = timed::<B, _>(wait, device, || chunk.kept_input(stages, device));
        forward += seconds;
        if let Some(input) = input? {
            gram += accumulate(&mut grams[0], input, wait, device);
            continue;
        }
        let (flow, seconds) = timed::<B, _>(wait, device, || chunk.flow(device));
        forward += seconds;
        let mut flow = flow?;
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
    Ok(Lane {
        grams: grams.into_iter().flatten().collect(),
        forward,
        gram,
    })
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
