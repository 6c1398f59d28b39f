//! The calibration windows' hidden states on their way through the blocks, and the branches that
//! still share them.
//!
//! All branches begin on one stream. It splits when its branches first differ: at the first solved
//! tap of block 0, where each branch goes on with its own quantized weights. With dense
//! propagation it never splits.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;
use gptq_format::{FormatError, Half, le_bytes};
use gptq_kernels::{Engine, HostBuffer, Routed, dtype, half_of, map_lanes};
use gptq_model::{Block, Flow};
use gptq_plan::Places;
use gptq_solver::SolverError;
use gptq_spec::Register;

use crate::RunError;
use crate::hidden_range::{self, Overflow};
use crate::profile::{Clock, Phase};
use crate::scratch::{DiskSlot, Scratch};

/// Storage of hidden states between taps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StateStorage {
    /// 16-bit type of the states: half the memory of f32, and its rounding is far below the quantization's
    /// error.
    pub(crate) half: Half,
    /// True if values beyond its range are clamped.
    pub(crate) clamp: bool,
}

/// Place of a rank's chunks among those of all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// Number of chunks of the ranks before it.
    pub(crate) first: usize,
    /// Number of all ranks' chunks.
    pub(crate) of: usize,
}

/// Hidden states, in chunks of windows, and the indices of the branches they belong to.
#[derive(Clone)]
pub(crate) struct Stream<B: Engine> {
    /// This rank's.
    pub(crate) chunks: Vec<Chunk<B>>,
    pub(crate) span: Span,
    /// Features of the residual stream.
    pub(crate) hidden: usize,
    pub(crate) branches: Vec<usize>,
    pub(crate) keep: StateStorage,
}

/// One chunk's states, where they are kept between taps.
#[derive(Clone)]
pub(crate) enum Chunk<B: Engine> {
    Device(Flow<B>),
    Host {
        windows: usize,
        /// The residual stream and the other registers that are still to be read.
        states: BTreeMap<Register, HostStates>,
        /// Choices of experts that are still to be read.
        routed: BTreeMap<Register, Arc<Routed>>,
        /// Scratch file for the states; `None` if they are kept in memory.
        scratch: Option<Arc<Scratch>>,
    },
}

/// `[tokens, features]` on the host.
#[derive(Clone)]
pub(crate) struct HostStates {
    values: Values,
    half: Half,
    shape: [usize; 2],
}

#[derive(Clone)]
enum Values {
    Memory(Arc<HostBuffer>),
    Disk(Arc<DiskSlot>),
}

impl HostStates {
    /// Into `scratch`, if there is one, else into memory.
    fn new<B: Engine>(
        states: Tensor<B, 2>,
        half: Half,
        scratch: Option<&Arc<Scratch>>,
    ) -> Result<Self, FormatError> {
        let shape = states.dims();
        let values = B::download(B::cast(states, dtype(half)));
        let values = match scratch {
            None => Values::Memory(Arc::new(values)),
            Some(scratch) => Values::Disk(Arc::new(scratch.put(le_bytes(values.bits()))?)),
        };
        Ok(HostStates {
            values,
            half,
            shape,
        })
    }

    /// Copies the states to the device, in the compute dtype.
    fn upload<B: Engine>(&self, device: &B::Device) -> Result<Tensor<B, 2>, FormatError> {
        let upload = |values: &HostBuffer| B::upload(values, 0, self.shape, device);
        let states = match &self.values {
            Values::Memory(values) => upload(values),
            Values::Disk(slot) => {
                let mut values = B::host_buffer(self.shape.iter().product(), self.half, device);
                // The values were written by this machine, in its byte order.
                slot.read(bytemuck::cast_slice_mut(values.bits_mut()))?;
                upload(&values)
            }
        };
        Ok(B::cast(states, B::compute(self.half)))
    }
}

/// Kept states in compute dtype.
fn computed<B: Engine>(flow: Flow<B>) -> Flow<B> {
    let half = half_of(flow.residual.dtype());
    flow.cast(B::compute(half))
}

impl<B: Engine> Chunk<B> {
    /// Windows, tokens, and features of the residual.
    pub(crate) fn shape(&self) -> [usize; 3] {
        let (windows, [tokens, features]) = match self {
            Chunk::Device(flow) => (flow.windows, flow.residual.dims()),
            Chunk::Host {
                windows, states, ..
            } => (*windows, states[&Register::RESIDUAL].shape),
        };
        [windows, tokens, features]
    }

    /// The residual's bits: all there is at a block's end.
    pub(crate) fn residual(&self) -> Result<Cow<'_, [u16]>, FormatError> {
        let states = match self {
            Chunk::Device(flow) => {
                let values = B::download(flow.residual.clone());
                return Ok(Cow::Owned(values.bits().to_vec()));
            }
            Chunk::Host { states, .. } => &states[&Register::RESIDUAL],
        };
        match &states.values {
            Values::Memory(values) => Ok(Cow::Borrowed(values.bits())),
            Values::Disk(slot) => {
                let mut bits = vec![0; states.shape.iter().product()];
                slot.read(bytemuck::cast_slice_mut(&mut bits))?;
                Ok(Cow::Owned(bits))
            }
        }
    }

    /// A residual in the host's memory, by its bits and the chunk's shape.
    pub(crate) fn of_bits(
        bits: Vec<u16>,
        [windows, tokens, features]: [usize; 3],
        half: Half,
    ) -> Self {
        let residual = HostStates {
            values: Values::Memory(Arc::new(HostBuffer::pageable(bits, half))),
            half,
            shape: [tokens, features],
        };
        Chunk::Host {
            windows,
            states: BTreeMap::from([(Register::RESIDUAL, residual)]),
            routed: BTreeMap::new(),
            scratch: None,
        }
    }

    /// Keeps `flow` on the host. `unchanged` is what of it is there already.
    fn on_host(
        flow: Flow<B>,
        half: Half,
        mut unchanged: BTreeMap<Register, HostStates>,
        scratch: Option<Arc<Scratch>>,
    ) -> Result<Self, FormatError> {
        let residual = (Register::RESIDUAL, flow.residual);
        let states = [residual].into_iter().chain(flow.activations);
        let keep = |(register, states)| {
            let kept = match unchanged.remove(&register) {
                Some(kept) => kept,
                None => HostStates::new(states, half, scratch.as_ref())?,
            };
            Ok((register, kept))
        };
        Ok(Chunk::Host {
            windows: flow.windows,
            states: states.map(keep).collect::<Result<_, FormatError>>()?,
            routed: flow.routed,
            scratch,
        })
    }

    /// The input of a single tap that takes a register as it is kept: nothing else need be brought to
    /// the device for its Gram matrix.
    pub(crate) fn kept_input(
        &self,
        block: &Block<B>,
        taps: Range<usize>,
        device: &B::Device,
    ) -> Result<Option<Tensor<B, 2>>, FormatError> {
        let single = Some(taps.start).filter(|_| taps.len() == 1);
        let Some(register) = single.and_then(|tap| block.spec().kept_input(tap)) else {
            return Ok(None);
        };
        self.register(register, device)
    }

    /// Returns a register as it is kept, in compute dtype on `device`; `None` if it is not.
    pub(crate) fn register(
        &self,
        register: Register,
        device: &B::Device,
    ) -> Result<Option<Tensor<B, 2>>, FormatError> {
        match self {
            Chunk::Device(flow) => {
                let compute = B::compute(half_of(flow.residual.dtype()));
                Ok(flow
                    .register(register)
                    .map(|states| B::cast(states, compute)))
            }
            Chunk::Host { states, .. } => {
                let states = states.get(&register);
                states.map(|states| states.upload(device)).transpose()
            }
        }
    }

    /// Returns the residual stream in compute dtype on `device`.
    pub(crate) fn residual_stream(&self, device: &B::Device) -> Result<Tensor<B, 2>, FormatError> {
        let residual = self.register(Register::RESIDUAL, device)?;
        Ok(residual.expect("the residual stream is always kept"))
    }

    /// The states in compute dtype on `device`.
    pub(crate) fn flow(&self, device: &B::Device) -> Result<Flow<B>, FormatError> {
        match self {
            Chunk::Device(flow) => Ok(computed(flow.clone())),
            Chunk::Host {
                windows,
                states,
                routed,
                ..
            } => {
                let mut flow = Flow::new(*windows, states[&Register::RESIDUAL].upload(device)?);
                flow.routed.clone_from(routed);
                for (&register, states) in states {
                    if register != Register::RESIDUAL {
                        flow.activations.insert(register, states.upload(device)?);
                    }
                }
                Ok(flow)
            }
        }
    }

    /// Runs `taps`, and keeps what comes of them. Also how many values were clamped.
    fn advance(
        self,
        block: &Block<B>,
        taps: Range<usize>,
        device: &B::Device,
        keep: StateStorage,
    ) -> Result<(Self, usize), FormatError> {
        let (flow, on_host) = match self {
            Chunk::Device(flow) => (computed(flow), None),
            Chunk::Host {
                ref states,
                ref scratch,
                ..
            } => {
                // Registers are written once, but for the residual stream.
                let mut unchanged = states.clone();
                if block.spec().adds(taps.clone()) {
                    unchanged.remove(&Register::RESIDUAL);
                }
                (self.flow(device)?, Some((unchanged, scratch.clone())))
            }
        };
        let end = block.advance(taps, flow);
        let (end, clamped) = match keep.clamp {
            true => hidden_range::clamp(end, keep.half),
            false => (end, 0),
        };
        let chunk = match on_host {
            None => Chunk::Device(end.cast(dtype(keep.half))),
            Some((unchanged, scratch)) => Chunk::on_host(end, keep.half, unchanged, scratch)?,
        };
        Ok((chunk, clamped))
    }
}

impl Span {
    /// Returns the place of the rank's among every `step`-th chunk of all ranks'.
    pub(crate) fn every(self, step: usize) -> Span {
        Span {
            first: self.first.div_ceil(step),
            of: self.of.div_ceil(step),
        }
    }
}

impl<B: Engine> Stream<B> {
    /// Keeps each chunk where it belongs as it comes: of the rank's chunks every `step`-th, in their order.
    pub(crate) fn new<E>(
        flows: impl Iterator<Item = Result<Flow<B>, E>>,
        (span, hidden): (Span, usize),
        step: usize,
        branches: Vec<usize>,
        places: &Places,
        scratch: Option<&Arc<Scratch>>,
        keep: StateStorage,
    ) -> Result<Self, RunError>
    where
        RunError: From<E>,
    {
        let half = keep.half;
        let on_host = |flow, scratch| Ok(Chunk::on_host(flow, half, BTreeMap::new(), scratch)?);
        let place = |(i, flow): (usize, Result<Flow<B>, E>)| match i * step {
            i if i < places.device => Ok(Chunk::Device(flow?.cast(dtype(half)))),
            i if i < places.device + places.host => on_host(flow?, None),
            _ => on_host(flow?, scratch.cloned()),
        };
        let chunks = flows.enumerate().map(place);
        Ok(Stream {
            chunks: chunks.collect::<Result<_, RunError>>()?,
            span,
            hidden,
            branches,
            keep,
        })
    }

    /// Every `step`-th chunk of all ranks', of no branch.
    pub(crate) fn every(&self, step: usize) -> Self {
        let chunks = (self.span.first..).zip(&self.chunks);
        let chunks = chunks.filter(|(at, _)| at.is_multiple_of(step));
        Stream {
            chunks: chunks.map(|(_, chunk)| chunk.clone()).collect(),
            span: self.span.every(step),
            hidden: self.hidden,
            branches: Vec::new(),
            keep: self.keep,
        }
    }

    /// The first `tokens` tokens of every `step`-th window before the first block, of no branch: a chunk on
    /// the device for each window.
    pub(crate) fn sample(
        &self,
        step: usize,
        tokens: usize,
        device: &B::Device,
    ) -> Result<Self, FormatError> {
        let mut chunks = Vec::new();
        let mut before = 0;
        for chunk in &self.chunks {
            let [windows, all, features] = chunk.shape();
            let length = all / windows;
            let taken = (0..windows).filter(|i| (before + i).is_multiple_of(step));
            let taken: Vec<usize> = taken.collect();
            before += windows;
            if taken.is_empty() {
                continue;
            }
            let states = B::cast(chunk.flow(device)?.residual, dtype(self.keep.half));
            chunks.extend(taken.into_iter().map(|i| {
                let rows = i * length..i * length + tokens;
                Chunk::Device(Flow::new(1, states.clone().slice([rows, 0..features])))
            }));
        }
        let of = chunks.len();
        Ok(Stream {
            chunks,
            span: Span { first: 0, of },
            hidden: self.hidden,
            branches: Vec::new(),
            keep: self.keep,
        })
    }

    /// Finds values of the states that are not finite, to explain a failure.
    fn not_finite(&self, device: &B::Device) -> Result<Option<Overflow>, FormatError> {
        let flows = self.chunks.iter().map(|chunk| chunk.flow(device));
        hidden_range::search(self.keep.half, flows)
    }

    /// Runs `taps` with `block`'s weights. Also how many values were clamped.
    pub(crate) fn advance(
        self,
        block: &Block<B>,
        taps: Range<usize>,
        device: &B::Device,
        clock: &mut Clock,
    ) -> Result<(Self, usize), FormatError> {
        let (keep, span, hidden) = (self.keep, self.span, self.hidden);
        let advanced = clock.measure::<B, _>(Phase::Forward, device, || {
            map_lanes::<B, _, _>(self.chunks, |chunk| {
                chunk.advance(block, taps.clone(), device, keep)
            })
        });
        let advanced = advanced
            .into_iter()
            .collect::<Result<Vec<_>, FormatError>>()?;
        let (chunks, clamped): (Vec<_>, Vec<usize>) = advanced.into_iter().unzip();
        let stream = Stream {
            chunks,
            span,
            hidden,
            branches: self.branches,
            keep,
        };
        Ok((stream, clamped.iter().sum()))
    }
}

/// Says which hidden states a Gram matrix that is not finite came from, if it was the ones that are kept.
pub(crate) fn explained<B: Engine>(
    error: RunError,
    stream: &Stream<B>,
    device: &B::Device,
) -> RunError {
    match error {
        RunError::Solver {
            branch,
            modules,
            source,
        } if matches!(*source, SolverError::NonFiniteGram { .. }) => {
            match stream.not_finite(device) {
                Ok(Some(source)) => RunError::HiddenStates {
                    branch,
                    modules,
                    source,
                },
                _ => RunError::Solver {
                    branch,
                    modules,
                    source,
                },
            }
        }
        error => error,
    }
}
