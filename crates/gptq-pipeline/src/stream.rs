//! The calibration windows' hidden states on their way through the blocks, and the branches that
//! still share them.
//!
//! All branches begin on one stream. It splits when its branches first differ: at the first solved
//! stage of block 0, where each branch goes on with its own quantised weights. With dense
//! propagation it never splits.

use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use gptq_format::{FormatError, le_bytes};
use gptq_kernels::{Engine, HostBuffer, map_lanes};
use gptq_model::{Block, Flow, ModelError, Stage};

use crate::PipelineError;
use crate::hidden_range::{self, Overflow};
use crate::memory::Places;
use crate::profile::{Clock, Phase};
use crate::scratch::{Scratch, Slot};

/// Hidden states between stages are kept in this type: half the memory, and its rounding is far below
/// the quantisation's error.
const KEEP: DType = DType::F16;

/// Hidden states, in chunks of windows, and the indices of the branches they belong to.
#[derive(Clone)]
pub(crate) struct Stream<B: Engine> {
    pub(crate) chunks: Vec<Chunk<B>>,
    pub(crate) branches: Vec<usize>,
    /// Bring states beyond f16's range back into it.
    clamp: bool,
}

/// One chunk's states, where they are kept between stages.
#[derive(Clone)]
pub(crate) enum Chunk<B: Engine> {
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
pub(crate) struct HostStates {
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
    pub(crate) fn kept_input(
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
    pub(crate) fn flow(&self, device: &B::Device) -> Result<Flow<B>, FormatError> {
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

    /// Runs `stages`; with `clamp`, brings what comes of them into f16's range. Also how many values
    /// that took.
    fn advance(
        self,
        block: &Block<B>,
        stages: &[Stage],
        device: &B::Device,
        clamp: bool,
    ) -> Result<(Self, usize), FormatError> {
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
        let (end, clamped) = match clamp {
            true => hidden_range::clamp(end),
            false => (end, 0),
        };
        let chunk = match kept {
            None => Chunk::Device(end.cast(KEEP)),
            Some((residual, scratch)) => Chunk::on_host(end, residual, scratch)?,
        };
        Ok((chunk, clamped))
    }
}

impl<B: Engine> Stream<B> {
    /// Keeps each chunk where it belongs as it comes.
    pub(crate) fn new(
        flows: impl Iterator<Item = Result<Flow<B>, ModelError>>,
        branches: Vec<usize>,
        places: &Places,
        scratch: Option<&Arc<Scratch>>,
        clamp: bool,
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
            clamp,
        })
    }

    /// Every `step`-th chunk, of no branch.
    pub(crate) fn every(&self, step: usize) -> Self {
        Stream {
            chunks: self.chunks.iter().step_by(step).cloned().collect(),
            branches: Vec::new(),
            clamp: self.clamp,
        }
    }

    /// What of the states is not finite, for explaining a failure.
    pub(crate) fn not_finite(&self, device: &B::Device) -> Result<Option<Overflow>, FormatError> {
        let flows = self.chunks.iter().map(|chunk| chunk.flow(device));
        hidden_range::search(flows)
    }

    /// Runs `stages` with `block`'s weights. Also how many values were clamped.
    pub(crate) fn advance(
        self,
        block: &Block<B>,
        stages: &[Stage],
        device: &B::Device,
        clock: &mut Clock,
    ) -> Result<(Self, usize), FormatError> {
        let clamp = self.clamp;
        let advanced = clock.measure::<B, _>(Phase::Forward, device, || {
            map_lanes::<B, _, _>(self.chunks, |chunk| {
                chunk.advance(block, stages, device, clamp)
            })
        });
        let advanced = advanced
            .into_iter()
            .collect::<Result<Vec<_>, FormatError>>()?;
        let (chunks, clamped): (Vec<_>, Vec<usize>) = advanced.into_iter().unzip();
        let stream = Stream {
            chunks,
            branches: self.branches,
            clamp,
        };
        Ok((stream, clamped.iter().sum()))
    }
}
