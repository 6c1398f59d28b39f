//! The loop over blocks, streams and taps.
//!
//! For each block, each stream of hidden states is taken from tap to tap: a [`Strategy`] gives the linears of the
//! tap their quantized weights, branch by branch, and the stream goes on with these. A stream splits where
//! its branches first get weights of their own; with dense propagation it never does. Branches are taken depth
//! first through the block, so that one branch's activations are alive at a time.

use std::ops::Range;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use gptq_kernels::Engine;
use gptq_model::{Block, Model};
use gptq_plan::{ExpertTokens, Plan, Propagation};

use crate::RunError;
use crate::chunking::chunking;
use crate::expert_grams::ExpertTap;
use crate::gram::{Dense, TapGrams, grams};
use crate::lanes::count_ranks;
use crate::output_errors::OutputErrors;
use crate::peers::Peers;
use crate::profile::{Clock, Phase};
use crate::read_ahead::Ahead;
use crate::states::States;
use crate::stream::{Stream, explained};

/// A tap of one branch in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct At {
    pub(crate) layer: usize,
    pub(crate) branch: usize,
    pub(crate) tap: usize,
}

/// The part of a pass over the blocks that gives linears their quantized weights.
pub(crate) trait Strategy<B: Engine> {
    /// True if weights are found from Gram matrices of the taps' inputs, false if they are known.
    fn solves(&self) -> bool;

    /// Gives `block` the quantized weights of the linears at a tap, of experts those whose `grams` are given. They are
    /// there if the strategy solves, and `compared` where outputs are compared with the dense model's.
    fn tap(
        &mut self,
        at: At,
        grams: Option<TapGrams<B>>,
        compared: Option<&OutputErrors<B>>,
        block: &mut Block<B>,
        clock: &mut Clock,
    ) -> Result<(), RunError>;

    /// True if the weights of `branch` are tuned together once every tap of a block has them.
    fn tunes(&self, _branch: usize) -> bool {
        false
    }

    /// Tunes the weights of a block that `branch` is through: the second of `blocks` has them, the first the dense
    /// ones; `start` is the branch's states before the block. [`Strategy::tap`] is then called once more for each tap,
    /// without Gram matrices.
    fn tune(
        &mut self,
        _layer: usize,
        _branch: usize,
        _blocks: [&Block<B>; 2],
        _start: &Stream<B>,
        _dense: &Dense<B>,
        _clock: &mut Clock,
    ) -> Result<(), RunError> {
        Ok(())
    }

    /// Is told that a branch has its weights of `taps`: `dense` is the block without them, `stream` the states
    /// before the taps.
    fn subset_done(
        &mut self,
        _at: At,
        _dense: &Block<B>,
        _quantized: &Block<B>,
        _stream: &Stream<B>,
        _clock: &mut Clock,
    ) -> Result<(), RunError> {
        Ok(())
    }

    /// Adds time that was spent on a branch alone, or its share of what several have in common.
    fn spent(&mut self, _branch: usize, _seconds: f64) {}

    /// Is told how many values were clamped behind `taps`, for each of `branches`.
    fn clamped(&mut self, _layer: usize, _taps: Range<usize>, _branches: &[usize], _values: usize) {
    }

    /// Is told that a branch is through a block.
    fn branch_end(
        &mut self,
        _layer: usize,
        _branch: usize,
        _compared: Option<&OutputErrors<B>>,
    ) -> Result<(), RunError> {
        Ok(())
    }

    /// Is told that all branches are through a block, which was made from tensors of the digest `source`.
    fn block_end(
        &mut self,
        _layer: usize,
        _source: String,
        _states: &States<B>,
        _clock: &mut Clock,
    ) -> Result<(), RunError> {
        Ok(())
    }
}

/// Some branches on their way through the blocks.
pub(crate) struct BlockLoop<'a, B: Engine> {
    pub(crate) plan: &'a Plan,
    pub(crate) model: &'a Model<B>,
    pub(crate) peers: Peers<'a, B>,
    pub(crate) clock: &'a mut Clock,
    /// True if device memory is to be given back as soon as it is unused: CubeCL's pools keep what was once
    /// needed, a pool for each range of sizes.
    pub(crate) frugal: bool,
    /// Limit on the bytes of experts' Gram matrices that are alive together.
    pub(crate) gram_bytes: u64,
    /// Ends the run where it returns an error, which is asked between taps.
    pub(crate) check: &'a mut dyn FnMut() -> Result<(), RunError>,
}

/// Gram matrices of a subset's taps, where they are summed before its linears are solved.
type SubsetGrams<B> = Vec<Option<TapGrams<B>>>;

/// A block that the branches are in.
struct Entered<'a, B: Engine> {
    layer: usize,
    block: &'a Block<B>,
    /// The states of the stream that is in it, as they were before it, if any of its branches is tuned.
    start: Option<Stream<B>>,
    dense: Option<&'a Dense<B>>,
    compared: Option<&'a mut OutputErrors<B>>,
}

impl<B: Engine> BlockLoop<'_, B> {
    /// Takes `states` through the blocks `layers`, which come from `blocks` in order.
    ///
    /// # Errors
    /// Those of the reader, the device, and the strategy.
    pub(crate) fn run(
        &mut self,
        layers: Range<usize>,
        states: &mut States<B>,
        blocks: &Receiver<Ahead>,
        strategy: &mut dyn Strategy<B>,
    ) -> Result<(), RunError> {
        let model = self.model;
        for layer in layers {
            let read = || {
                let block = blocks
                    .recv()
                    .expect("the reader ends with an error or the last block");
                block.map(|(block, source)| (model.upload(block), source))
            };
            let (block, source) =
                (self.clock).measure::<B, _>(Phase::Read, model.device(), read)?;
            self.block(layer, &block, states, strategy)?;
            strategy.block_end(layer, source, states, self.clock)?;
        }
        Ok(())
    }

    /// Takes `states` through one block.
    pub(crate) fn block(
        &mut self,
        layer: usize,
        block: &Block<B>,
        states: &mut States<B>,
        strategy: &mut dyn Strategy<B>,
    ) -> Result<(), RunError> {
        let device = self.model.device();
        if let Some(dense) = &mut states.dense {
            dense.enter(block, device, self.clock)?;
        }
        if let Some(compared) = &mut states.compared {
            compared.enter(block, strategy.solves(), device, self.clock)?;
        }
        let mut entered = Entered {
            layer,
            block,
            start: None,
            dense: states.dense.as_ref(),
            compared: states.compared.as_mut(),
        };
        let mut done = Vec::with_capacity(self.plan.branches.len());
        for stream in std::mem::take(&mut states.streams) {
            let sequential = self.plan.branches[stream.branches[0]].true_sequential;
            let taps = block.spec().taps();
            let subsets: Vec<Range<usize>> = if sequential {
                taps.map(|tap| tap..tap + 1).collect()
            } else {
                vec![taps]
            };
            let tuned = stream.branches.iter().any(|&it| strategy.tunes(it));
            entered.start = tuned.then(|| stream.clone());
            self.taps(&mut entered, stream, block, &subsets, strategy, &mut done)?;
        }
        states.streams = done;
        if let Some(compared) = &mut states.compared {
            compared.leave();
        }
        Ok(())
    }

    /// Gives every branch of `stream` its weights of the first of `subsets`, advances with these, and continues
    /// with the rest; a branch at a time, once they differ. Streams at the block's end are pushed to `done`.
    fn taps(
        &mut self,
        entered: &mut Entered<'_, B>,
        mut stream: Stream<B>,
        block: &Block<B>,
        subsets: &[Range<usize>],
        strategy: &mut dyn Strategy<B>,
        done: &mut Vec<Stream<B>>,
    ) -> Result<(), RunError> {
        let Some((subset, rest)) = subsets.split_first() else {
            if let [branch] = stream.branches[..]
                && strategy.tunes(branch)
            {
                drop(stream);
                stream = self.tune(entered, branch, block, strategy)?;
            }
            for &branch in &stream.branches {
                strategy.branch_end(entered.layer, branch, entered.compared.as_deref())?;
            }
            done.push(stream);
            return Ok(());
        };
        (self.check)()?;
        let started = Instant::now();
        let (layer, device) = (entered.layer, self.model.device());
        let corrects = |&branch: &usize| self.plan.branches[branch].method.corrects_mismatch();
        // The model's first input is the same for all; asked all the same, its Gram matrix would be summed
        // in another order, and for branches that do not ask.
        let embedded = layer == 0 && subset.start == 0;
        let dense = entered
            .dense
            .filter(|_| !embedded && stream.branches.iter().any(corrects));
        let grams = strategy
            .solves()
            .then(|| {
                let place = (&self.peers, device);
                grams(&stream, block, subset.clone(), dense, place, self.clock)
            })
            .transpose()?;
        let branches = std::mem::take(&mut stream.branches);
        let spec = block.spec();
        let mixed = subset.clone().any(|tap| spec.experts_at(tap).is_some());
        let mut experts = match mixed {
            true => {
                let grams = grams.as_ref();
                self.experts(
                    entered,
                    (&stream, &branches),
                    block,
                    (subset, grams),
                    strategy,
                )?
            }
            false => Vec::new(),
        }
        .into_iter();
        let shared = started.elapsed().as_secs_f64() / branches.len() as f64;
        let splits = self.plan.propagation == Propagation::Quantized;
        let mut parent = Some(stream);
        for (i, &branch) in branches.iter().enumerate() {
            let started = Instant::now();
            let states = parent.as_ref().expect("taken only by the last branch");
            let quantized = match experts.next() {
                Some(quantized) => quantized,
                None => self.plain(entered, (states, branch), block, (subset, &grams), strategy)?,
            };
            let tap = subset.start;
            let at = At { layer, branch, tap };
            strategy.subset_done(at, block, &quantized, states, self.clock)?;
            if !splits {
                strategy.spent(branch, shared + started.elapsed().as_secs_f64());
                continue;
            }
            // The last branch takes the parent's states over; the others share them.
            let own = if i + 1 < branches.len() {
                parent.clone()
            } else {
                parent.take()
            };
            let mut own = own.expect("taken only by the last branch");
            own.branches = vec![branch];
            let own = self.advance(layer, own, &quantized, subset, strategy)?;
            if self.frugal {
                B::release_memory(device);
            }
            strategy.spent(branch, shared + started.elapsed().as_secs_f64());
            self.taps(entered, own, &quantized, rest, strategy, done)?;
        }
        if let Some(mut stream) = parent {
            stream.branches = branches;
            let stream = self.advance(layer, stream, block, subset, strategy)?;
            self.taps(entered, stream, block, rest, strategy, done)?;
        }
        Ok(())
    }

    /// Returns the block with a branch's weights of a subset without experts.
    fn plain(
        &mut self,
        entered: &mut Entered<'_, B>,
        (states, branch): (&Stream<B>, usize),
        block: &Block<B>,
        (subset, grams): (&Range<usize>, &Option<SubsetGrams<B>>),
        strategy: &mut dyn Strategy<B>,
    ) -> Result<Block<B>, RunError> {
        let (layer, device) = (entered.layer, self.model.device());
        let mut quantized = block.clone();
        for (nth, tap) in subset.clone().enumerate() {
            (self.check)()?;
            let at = At { layer, branch, tap };
            let grams = grams.as_ref().and_then(|grams| grams[nth].clone());
            let compared = entered.compared.as_deref();
            strategy
                .tap(at, grams, compared, &mut quantized, self.clock)
                .map_err(|error| explained(error, states, device))?;
            if let Some(compared) = &mut entered.compared {
                compared.advance(branch, tap, &quantized, device, self.clock)?;
            }
        }
        Ok(quantized)
    }

    /// Returns the block with each branch's weights of a subset with experts, which are taken in slices.
    fn experts(
        &mut self,
        entered: &mut Entered<'_, B>,
        (stream, branches): (&Stream<B>, &[usize]),
        block: &Block<B>,
        (subset, grams): (&Range<usize>, Option<&SubsetGrams<B>>),
        strategy: &mut dyn Strategy<B>,
    ) -> Result<Vec<Block<B>>, RunError> {
        let (layer, device, plan) = (entered.layer, self.model.device(), self.plan);
        let mut blocks = vec![block.clone(); branches.len()];
        for (nth, tap) in subset.clone().enumerate() {
            let experts = block.spec().inputs(tap);
            let slice = match grams.is_some() {
                true => plan.expert_slice(block.spec(), tap, chunking::<B>(), self.gram_bytes),
                false => experts,
            };
            for first in (0..experts).step_by(slice) {
                let part = first..(first + slice).min(experts);
                for tokens in [ExpertTokens::Routed, ExpertTokens::All] {
                    let method = |branch: usize| plan.branches[branch].method;
                    let members = branches.iter().zip(&mut blocks);
                    let mut members =
                        members.filter(|(branch, _)| method(**branch).experts == tokens);
                    let Some(leading) = members.next() else {
                        continue;
                    };
                    let members: Vec<_> = std::iter::once(leading).chain(members).collect();
                    let corrects = members
                        .iter()
                        .any(|(it, _)| method(**it).corrects_mismatch());
                    let own = match grams {
                        Some(grams) if experts == 1 => grams[nth].clone(),
                        Some(_) => {
                            let sums = ExpertTap {
                                block,
                                dense_block: entered.block,
                                tap,
                                subset: subset.clone(),
                                dense: entered.dense.filter(|_| corrects),
                                tokens,
                                peers: self.peers,
                                device,
                            };
                            let of = || sums.grams(stream, part.clone());
                            let of = self.clock.measure::<B, _>(Phase::Gram, device, of)?;
                            Some(TapGrams { first, of })
                        }
                        None => None,
                    };
                    for (&branch, quantized) in members {
                        (self.check)()?;
                        let at = At { layer, branch, tap };
                        let compared = entered.compared.as_deref();
                        strategy
                            .tap(at, own.clone(), compared, quantized, self.clock)
                            .map_err(|error| explained(error, stream, device))?;
                    }
                }
            }
            if let Some(compared) = &mut entered.compared {
                for (&branch, quantized) in branches.iter().zip(&blocks) {
                    compared.advance(branch, tap, quantized, device, self.clock)?;
                }
            }
        }
        Ok(blocks)
    }

    /// Tunes the block of a branch, which has its weights in `quantized`, and takes the branch through it again.
    fn tune(
        &mut self,
        entered: &mut Entered<'_, B>,
        branch: usize,
        quantized: &Block<B>,
        strategy: &mut dyn Strategy<B>,
    ) -> Result<Stream<B>, RunError> {
        let started = Instant::now();
        let (layer, device) = (entered.layer, self.model.device());
        let start = entered.start.as_ref().expect("kept for whom tunes");
        let mut stream = Stream {
            branches: vec![branch],
            ..start.clone()
        };
        let dense = entered
            .dense
            .expect("the dense model runs beside who tunes");
        let blocks = [entered.block, quantized];
        strategy.tune(layer, branch, blocks, &stream, dense, self.clock)?;
        if let Some(compared) = &mut entered.compared {
            compared.restart(branch);
        }
        let mut block = entered.block.clone();
        for tap in block.spec().taps() {
            (self.check)()?;
            let at = At { layer, branch, tap };
            let compared = entered.compared.as_deref();
            strategy.tap(at, None, compared, &mut block, self.clock)?;
            if let Some(compared) = &mut entered.compared {
                compared.advance(branch, tap, &block, device, self.clock)?;
            }
            stream = self.advance(layer, stream, &block, &(tap..tap + 1), strategy)?;
        }
        if self.frugal {
            B::release_memory(device);
        }
        strategy.spent(branch, started.elapsed().as_secs_f64());
        Ok(stream)
    }

    /// Runs `taps` with `block`'s weights.
    fn advance(
        &mut self,
        layer: usize,
        stream: Stream<B>,
        block: &Block<B>,
        taps: &Range<usize>,
        strategy: &mut dyn Strategy<B>,
    ) -> Result<Stream<B>, RunError> {
        let device = self.model.device();
        let (stream, clamped) = stream.advance(block, taps.clone(), device, self.clock)?;
        let clamped = match stream.keep.clamp {
            true => count_ranks(clamped, self.peers.ranks)?,
            false => 0,
        };
        if clamped > 0 {
            strategy.clamped(layer, taps.clone(), &stream.branches, clamped);
        }
        Ok(stream)
    }
}

#[cfg(test)]
pub(crate) mod tests;
