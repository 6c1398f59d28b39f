//! The calibration windows' hidden states on their way through the blocks, and the branches that
//! still share them.
//!
//! All branches begin on one stream. It splits when its branches first differ: at the first solved
//! stage of block 0, where each branch goes on with its own quantised weights. With dense
//! propagation it never splits. Branches that make up for drift compare some of their chunks with the
//! dense model's own, which [`Dense`] takes through the blocks beside them.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{DType, Tensor};
use gptq_format::{FormatError, le_bytes};
use gptq_kernels::{Engine, HostBuffer, map_lanes};
use gptq_model::{Block, Flow, ModelError, Stage};

use crate::PipelineError;
use crate::hidden_range::{self, Overflow};
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

/// Of how many chunks one is run through the dense model too. What a quarter of the windows says about
/// the drift is nearly what all say, at a quarter of the cost (`crates/gptq-solver/ACCURACY.md`).
pub(crate) const DENSE_SHARE: usize = 4;

/// The dense model's states of every [`DENSE_SHARE`]-th chunk.
pub(crate) struct Dense<B: Engine> {
    /// Before each stage of the block that was entered last.
    before: Vec<Stream<B>>,
    end: Stream<B>,
}

impl<B: Engine> Dense<B> {
    /// From the embedded chunks.
    pub(crate) fn new(all: &Stream<B>) -> Self {
        Dense {
            before: Vec::new(),
            end: Stream {
                chunks: all.chunks.iter().step_by(DENSE_SHARE).cloned().collect(),
                branches: Vec::new(),
                clamp: all.clamp,
            },
        }
    }

    /// Runs the next block, dense.
    pub(crate) fn enter(
        &mut self,
        block: &Block<B>,
        device: &B::Device,
        clock: &mut Clock,
    ) -> Result<(), FormatError> {
        self.before.clear();
        for stage in Stage::ALL {
            let (next, _) = self.end.clone().advance(block, &[stage], device, clock)?;
            self.before.push(std::mem::replace(&mut self.end, next));
        }
        Ok(())
    }

    /// Chunk `chunk` of the branches' before `stage`, where there is one.
    fn chunk(&self, stage: Stage, chunk: usize) -> Option<&Chunk<B>> {
        let at = chunk
            .is_multiple_of(DENSE_SHARE)
            .then_some(chunk / DENSE_SHARE)?;
        self.before[stage as usize].chunks.get(at)
    }
}

/// What a stage's input says, f32 `[in, in]` each.
#[derive(Clone)]
pub(crate) struct Grams<B: Engine> {
    /// `XᵀX` of all tokens, upper triangle.
    pub(crate) all: Tensor<B, 2>,
    /// `XᵀX` and `(X_d - X)ᵀX` of the tokens that the dense model was given too.
    pub(crate) drift: Option<[Tensor<B, 2>; 2]>,
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

    /// What of the states is not finite, for explaining a failure.
    pub(crate) fn not_finite(&self, device: &B::Device) -> Option<Overflow> {
        // Those that cannot be read explain nothing.
        let flows = self
            .chunks
            .iter()
            .filter_map(|chunk| chunk.flow(device).ok());
        hidden_range::search(flows)
    }

    /// The Gram matrices of each stage's input, with `block`'s weights in between; the stream stays
    /// where it is.
    pub(crate) fn grams(
        &self,
        block: &Block<B>,
        stages: &[Stage],
        dense: Option<&Dense<B>>,
        device: &B::Device,
        clock: &mut Clock,
    ) -> Result<Vec<Grams<B>>, FormatError> {
        let started = Instant::now();
        let chunks: Vec<_> = self.chunks.iter().enumerate().collect();
        let tap = Tap {
            block,
            stages,
            dense,
            device,
            wait: clock.waits(),
        };
        let lane = chunks.len().div_ceil(B::LANES);
        let lanes = map_lanes::<B, _, _>(chunks.chunks(lane).collect(), |chunks| tap.lane(chunks));
        let lanes = lanes.into_iter().collect::<Result<Vec<_>, FormatError>>()?;
        let [forward, gram] = lanes
            .iter()
            .fold([0.0; 2], |[f, g], lane| [f + lane.forward, g + lane.gram]);
        let sums = lanes
            .into_iter()
            .map(|lane| lane.sums)
            .reduce(|sums, lane| sums.into_iter().zip(lane).map(|(a, b)| a + b).collect())
            .expect("a stream has at least one chunk");
        let grams = sums.into_iter().map(Sums::finish).collect();
        // Lanes run at the same time: their shares of it, not their sums.
        let seconds = started.elapsed().as_secs_f64();
        let share = forward / (forward + gram).max(f64::MIN_POSITIVE);
        clock.add(Phase::Forward, seconds * share);
        clock.add(Phase::Gram, seconds * (1.0 - share));
        Ok(grams)
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

/// Sums over chunks of one stage's input. Tokens that the dense model was given too are summed apart.
struct Sums<B: Engine> {
    apart: Option<[Tensor<B, 2>; 2]>,
    rest: Option<Tensor<B, 2>>,
}

impl<B: Engine> Sums<B> {
    /// Adds a chunk's input, and the dense model's for the same tokens.
    fn add(&mut self, x: Tensor<B, 2>, dense: Option<Tensor<B, 2>>) {
        let n = x.dims()[1];
        let zeros = || B::gram_zeros(n, &x.device());
        // Taken out, so that the engine owns a sum alone and can add in place.
        match dense {
            Some(dense) => {
                let [gram, cross] = self.apart.take().unwrap_or_else(|| [zeros(), zeros()]);
                let gram = B::gram_add(gram, x.clone());
                self.apart = Some([gram, B::cross_add(cross, dense, x)]);
            }
            None => {
                let rest = self.rest.take().unwrap_or_else(zeros);
                self.rest = Some(B::gram_add(rest, x));
            }
        }
    }

    fn finish(self) -> Grams<B> {
        let of_dense = self.apart.as_ref().map(|[gram, _]| gram.clone());
        Grams {
            all: sum(of_dense, self.rest).expect("a lane has at least one chunk"),
            drift: self.apart,
        }
    }
}

impl<B: Engine> std::ops::Add for Sums<B> {
    type Output = Sums<B>;

    fn add(self, other: Sums<B>) -> Sums<B> {
        let apart = match (self.apart, other.apart) {
            (Some([a, b]), Some([c, d])) => Some([a + c, b + d]),
            (one, other) => one.or(other),
        };
        Sums {
            apart,
            rest: sum(self.rest, other.rest),
        }
    }
}

fn sum<B: Engine>(a: Option<Tensor<B, 2>>, b: Option<Tensor<B, 2>>) -> Option<Tensor<B, 2>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (one, other) => one.or(other),
    }
}

/// What a lane found, and the seconds it took.
struct Lane<B: Engine> {
    sums: Vec<Sums<B>>,
    forward: f64,
    gram: f64,
}

/// Where and how inputs are tapped.
struct Tap<'a, B: Engine> {
    block: &'a Block<B>,
    stages: &'a [Stage],
    dense: Option<&'a Dense<B>>,
    device: &'a B::Device,
    wait: bool,
}

impl<B: Engine> Tap<'_, B> {
    /// [`Stream::grams`] over some of the chunks.
    fn lane(&self, chunks: &[(usize, &Chunk<B>)]) -> Result<Lane<B>, FormatError> {
        let empty = || Sums {
            apart: None,
            rest: None,
        };
        let mut sums: Vec<Sums<B>> = self.stages.iter().map(|_| empty()).collect();
        let (mut forward, mut gram) = (0.0, 0.0);
        for &(at, chunk) in chunks {
            let (input, seconds) = self.timed(|| chunk.kept_input(self.stages, self.device));
            forward += seconds;
            if let Some(input) = input? {
                let (dense, seconds) = self.timed(|| self.dense_input(self.stages[0], at));
                forward += seconds;
                let dense = dense?;
                gram += self.timed(|| sums[0].add(input, dense)).1;
                continue;
            }
            let (flow, seconds) = self.timed(|| chunk.flow(self.device));
            forward += seconds;
            let mut flow = flow?;
            for (i, &stage) in self.stages.iter().enumerate() {
                let inputs = || (self.block.input(stage, &flow), self.dense_input(stage, at));
                let ((input, dense), seconds) = self.timed(inputs);
                forward += seconds;
                let dense = dense?;
                gram += self.timed(|| sums[i].add(input, dense)).1;
                if i + 1 < self.stages.len() {
                    let (next, seconds) = self.timed(|| self.block.advance(stage, flow));
                    forward += seconds;
                    flow = next;
                }
            }
        }
        Ok(Lane {
            sums,
            forward,
            gram,
        })
    }

    /// What the dense model gives `stage` for chunk `at`, where it was run.
    fn dense_input(&self, stage: Stage, at: usize) -> Result<Option<Tensor<B, 2>>, FormatError> {
        let Some(chunk) = self.dense.and_then(|dense| dense.chunk(stage, at)) else {
            return Ok(None);
        };
        Ok(Some(match chunk.kept_input(&[stage], self.device)? {
            Some(input) => input,
            None => self.block.input(stage, &chunk.flow(self.device)?),
        }))
    }

    fn timed<T>(&self, work: impl FnOnce() -> T) -> (T, f64) {
        timed::<B, _>(self.wait, self.device, work)
    }
}
