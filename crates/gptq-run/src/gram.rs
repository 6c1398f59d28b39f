//! The Gram matrices of a stream's inputs, and how far these have drifted from the dense model's.
//!
//! Branches that make up for mismatch compare some of their chunks with the dense model's own, which
//! [`Dense`] takes through the blocks beside them.

use std::ops::Range;
use std::time::Instant;

use burn::tensor::Tensor;
use gptq_format::FormatError;
use gptq_kernels::Engine;
use gptq_model::Block;
use gptq_spec::BlockSpec;

use crate::RunError;
use crate::gram_sums::{DenseStates, GramSums, Grams, over_ranks};
use crate::lanes::{LaneChunks, lane_sums};
use crate::peers::Peers;
use crate::profile::{Clock, Phase, timed};
use crate::stream::{Chunk, Stream};

/// The dense model's states of every `step`-th chunk.
#[derive(Clone)]
pub(crate) struct Dense<B: Engine> {
    step: usize,
    /// States before each tap of the block that was entered last.
    before: Vec<Stream<B>>,
    end: Stream<B>,
}

impl<B: Engine> Dense<B> {
    /// Starts from those chunks' states before the next block.
    pub(crate) fn new(states: Stream<B>, step: usize) -> Self {
        Dense {
            step,
            before: Vec::new(),
            end: states,
        }
    }

    /// Returns the same with other states before the first tap and after the last, and none between.
    pub(crate) fn of(&self, start: Stream<B>, end: Stream<B>) -> Self {
        Dense {
            step: self.step,
            before: vec![start],
            end,
        }
    }

    /// Returns the states after the block that was entered last.
    pub(crate) fn end(&self) -> &Stream<B> {
        &self.end
    }

    /// Returns the states before a tap of the block that was entered last.
    pub(crate) fn before(&self, tap: usize) -> &Stream<B> {
        &self.before[tap]
    }

    /// Runs the next block, dense.
    pub(crate) fn enter(
        &mut self,
        block: &Block<B>,
        device: &B::Device,
        clock: &mut Clock,
    ) -> Result<(), FormatError> {
        self.before.clear();
        for tap in block.spec().taps() {
            let (next, _) = self
                .end
                .clone()
                .advance(block, tap..tap + 1, device, clock)?;
            self.before.push(std::mem::replace(&mut self.end, next));
        }
        Ok(())
    }

    /// Returns the place among its own chunks of chunk `chunk` of the branches, where there is one.
    fn place(&self, chunk: usize) -> Option<usize> {
        let own = chunk.is_multiple_of(self.step);
        own.then(|| chunk / self.step - self.end.span.first)
    }

    /// Returns chunk `chunk` of the branches' before `tap`, where there is one.
    pub(crate) fn chunk(&self, tap: usize, chunk: usize) -> Option<&Chunk<B>> {
        self.before(tap).chunks.get(self.place(chunk)?)
    }

    /// Returns chunk `chunk` of the branches' after `tap`, where there is one.
    pub(crate) fn chunk_after(&self, tap: usize, chunk: usize) -> Option<&Chunk<B>> {
        match tap + 1 < self.before.len() {
            true => self.chunk(tap + 1, chunk),
            false => self.end_chunk(chunk),
        }
    }

    /// Returns the same after the block that was entered last.
    pub(crate) fn end_chunk(&self, chunk: usize) -> Option<&Chunk<B>> {
        self.end.chunks.get(self.place(chunk)?)
    }
}

/// Gram matrices of consecutive inputs of a tap: of its one input, or of some experts'.
#[derive(Clone)]
pub(crate) struct TapGrams<B: Engine> {
    /// The first of the inputs.
    pub(crate) first: usize,
    /// Those of each.
    pub(crate) of: Vec<Grams<B>>,
}

/// The tap of those that are solved together whose outputs make up for what the residual stream has lost: the first
/// whose outputs are added to it, because those after it are not given what that one makes up for.
pub(crate) fn makes_up(spec: &BlockSpec, mut taps: Range<usize>) -> Option<usize> {
    taps.find(|&tap| spec.linears_of(tap).any(|it| spec.added(it).is_some()))
}

/// The Gram matrices of the input of each of `taps`, with `block`'s weights in between; the stream stays
/// where it is. Those of experts are left out.
pub(crate) fn grams<B: Engine>(
    stream: &Stream<B>,
    block: &Block<B>,
    taps: Range<usize>,
    dense: Option<&Dense<B>>,
    (peers, device): (&Peers<'_, B>, &B::Device),
    clock: &mut Clock,
) -> Result<Vec<Option<TapGrams<B>>>, RunError> {
    let started = Instant::now();
    let spec = block.spec();
    let tap = TapReader {
        block,
        makes_up: makes_up(spec, taps.clone()),
        taps: taps.clone(),
        dense,
        device,
        wait: clock.waits(),
    };
    let lanes = lane_sums(
        stream,
        peers.share(),
        &|chunks: &LaneChunks<'_, B>| tap.lane(chunks),
        &Lane::and,
    )?;
    let lanes = lanes.unwrap_or_else(|| Lane::none(taps.len()));
    let (forward, gram) = (lanes.forward, lanes.gram);
    // Lanes run at the same time: their shares of it, not their sums.
    let seconds = started.elapsed().as_secs_f64();
    let share = forward / (forward + gram).max(f64::MIN_POSITIVE);
    clock.add(Phase::Forward, seconds * share);
    clock.add(Phase::Gram, seconds * (1.0 - share));
    let mut grams = Vec::with_capacity(taps.len());
    for (sums, tap) in lanes.sums.into_iter().zip(taps) {
        grams.push(match spec.experts_at(tap) {
            Some(_) => None,
            None => {
                let shape = [spec.in_features(tap), stream.hidden];
                let of = over_ranks(vec![sums], shape, peers, device)?.into_iter();
                let of: Option<Vec<_>> = of.map(GramSums::finish).collect();
                of.map(|of| TapGrams { first: 0, of })
            }
        });
    }
    Ok(grams)
}

/// Results of a lane, and the seconds that each part took.
struct Lane<B: Engine> {
    sums: Vec<GramSums<B>>,
    forward: f64,
    gram: f64,
}

impl<B: Engine> Lane<B> {
    /// The results of no chunk, for so many taps.
    fn none(taps: usize) -> Self {
        Lane {
            sums: (0..taps).map(|_| GramSums::default()).collect(),
            forward: 0.0,
            gram: 0.0,
        }
    }

    fn and(self, other: Self) -> Self {
        let sums = self.sums.into_iter().zip(other.sums);
        Lane {
            sums: sums.map(|(a, b)| a + b).collect(),
            forward: self.forward + other.forward,
            gram: self.gram + other.gram,
        }
    }
}

/// Reads the inputs of some taps in a block.
struct TapReader<'a, B: Engine> {
    block: &'a Block<B>,
    taps: Range<usize>,
    /// See [`makes_up`].
    makes_up: Option<usize>,
    dense: Option<&'a Dense<B>>,
    device: &'a B::Device,
    wait: bool,
}

impl<B: Engine> TapReader<'_, B> {
    /// [`grams`] over some of the chunks.
    fn lane(&self, chunks: &LaneChunks<'_, B>) -> Result<Lane<B>, FormatError> {
        let taps = || self.taps.clone();
        let spec = self.block.spec();
        let mut sums: Vec<GramSums<B>> = taps().map(|_| GramSums::default()).collect();
        if taps().all(|tap| spec.experts_at(tap).is_some()) {
            return Ok(Lane::none(sums.len()));
        }
        let (mut forward, mut gram) = (0.0, 0.0);
        for &(at, chunk) in chunks {
            let (input, seconds) = self.timed(|| chunk.kept_input(self.block, taps(), self.device));
            forward += seconds;
            if let Some(input) = input? {
                let own = || chunk.residual_stream(self.device);
                let (dense, seconds) = self.timed(|| self.dense_states(self.taps.start, at, own));
                forward += seconds;
                let dense = dense?;
                gram += self.timed(|| sums[0].add(input, dense)).1;
                continue;
            }
            let (flow, seconds) = self.timed(|| chunk.flow(self.device));
            forward += seconds;
            let mut flow = flow?;
            for (sums, tap) in sums.iter_mut().zip(taps()) {
                if spec.experts_at(tap).is_none() {
                    let own = || Ok(flow.residual.clone());
                    let inputs = || {
                        let x = self.block.input(tap, &flow);
                        (x, self.dense_states(tap, at, own))
                    };
                    let ((input, dense), seconds) = self.timed(inputs);
                    forward += seconds;
                    let dense = dense?;
                    gram += self.timed(|| sums.add(input, dense)).1;
                }
                if tap + 1 < self.taps.end {
                    let (next, seconds) = self.timed(|| self.block.advance(tap..tap + 1, flow));
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

    /// Returns the dense model's states before `tap` for chunk `at`, where it was run; `own` gives the branch's
    /// residual stream there.
    fn dense_states(
        &self,
        tap: usize,
        at: usize,
        own: impl FnOnce() -> Result<Tensor<B, 2>, FormatError>,
    ) -> Result<Option<DenseStates<B>>, FormatError> {
        let Some(chunk) = self.dense.and_then(|dense| dense.chunk(tap, at)) else {
            return Ok(None);
        };
        let kept = chunk.kept_input(self.block, tap..tap + 1, self.device)?;
        let x = match kept {
            Some(input) => input,
            None => self.block.input(tap, &chunk.flow(self.device)?),
        };
        let residuals = match self.makes_up == Some(tap) {
            true => Some([chunk.residual_stream(self.device)?, own()?]),
            false => None,
        };
        Ok(Some(DenseStates { x, residuals }))
    }

    fn timed<T>(&self, work: impl FnOnce() -> T) -> (T, f64) {
        timed::<B, _>(self.wait, self.device, work)
    }
}
