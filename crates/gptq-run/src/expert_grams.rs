//! Gram matrices of experts' inputs, each of the tokens that the router gives the expert.
//!
//! With the router's weight `c` of an expert for a token, `Σ_j c_j` the sum over the token's experts, and inputs `x` of
//! the branch and `x_d` of the dense model, both by the branch's choice:
//!
//! ```text
//! gate, up   H = Σ c x xᵀ      C = Σ c (x_d - x) xᵀ
//! down       H = Σ c² x xᵀ     C = Σ c² (x_d - x) xᵀ     R = Σ c² / Σ_j c_j (r_d - r) xᵀ
//! ```
//!
//! A down projection's output is multiplied by `c`, hence the square, and each expert makes up for its share `c / Σ_j
//! c_j` of what the residual stream has lost: `r_d` is the dense block's end less what its experts add by the branch's
//! choice, so that a token that goes elsewhere is made up for too.
//!
//! An expert that is given few tokens *borrows* tokens: `P`, of an evenly spaced sample of all of them, as its linears
//! would be given them, joins `H` with the weight `τ n0 / (n0 + n) tr H / tr P`, and is all there is where it is given
//! none.

use std::ops::Range;

use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_format::FormatError;
use gptq_kernels::Engine;
use gptq_model::{Block, ExpertInputs, Flow};
use gptq_plan::ExpertTokens;
use rayon::prelude::*;

use crate::RunError;
use crate::gram::{Dense, makes_up};
use crate::gram_sums::{DenseStates, GramSums, Grams, RowWeights, add_each, over_ranks};
use crate::lanes::{LaneChunks, count_ranks, lane_sums};
use crate::peers::Peers;
use crate::stream::{Chunk, Stream};

/// Number of tokens that are borrowed, about.
const BORROWED: usize = 4096;
/// `τ`.
const SHARE: f64 = 1.0;
/// `n0`, in tokens for each feature of the input.
const ENOUGH: f64 = 0.1;
/// An expert with more tokens for each feature of its input borrows none.
const PLENTY: f64 = 4.0;

/// A tap of experts in a branch's block.
pub(crate) struct ExpertTap<'a, B: Engine> {
    /// The block with the branch's weights up to the tap.
    pub(crate) block: &'a Block<B>,
    /// The dense block.
    pub(crate) dense_block: &'a Block<B>,
    pub(crate) tap: usize,
    /// The taps that are solved together with it, from whose beginning states are given.
    pub(crate) subset: Range<usize>,
    /// The dense model's states, if mismatch is made up for.
    pub(crate) dense: Option<&'a Dense<B>>,
    pub(crate) tokens: ExpertTokens,
    pub(crate) peers: Peers<'a, B>,
    pub(crate) device: &'a B::Device,
}

impl<B: Engine> ExpertTap<'_, B> {
    /// The Gram matrices of the experts `experts`.
    pub(crate) fn grams(
        &self,
        stream: &Stream<B>,
        experts: Range<usize>,
    ) -> Result<Vec<Grams<B>>, RunError> {
        let sums = lane_sums(
            stream,
            self.peers.share(),
            &|chunks: &LaneChunks<'_, B>| self.routed(chunks, experts.clone()),
            &added,
        )?;
        let sums = self.over_ranks(stream, sums, experts.len())?;
        let features = self.block.spec().in_features(self.tap) as f64;
        let all = self.tokens == ExpertTokens::All;
        let few = |sums: &GramSums<B>| (sums.tokens as f64) < PLENTY * features;
        let borrows: Vec<usize> = (experts.clone().zip(&sums))
            .filter(|(_, sums)| all || few(sums))
            .map(|(expert, _)| expert)
            .collect();
        let borrowed: Vec<Option<Tensor<B, 2>>> = match borrows.is_empty() {
            true => Vec::new(),
            false => {
                let tokens = stream.chunks.iter().map(|chunk| chunk.shape()[1]).sum();
                let tokens = count_ranks(tokens, self.peers.ranks)?;
                let step = if all { 1 } else { (tokens / BORROWED).max(1) };
                let borrowing = match self.block.spec().dispatches(self.tap) {
                    true => &borrows[..1],
                    false => &borrows[..],
                };
                let sums = lane_sums(
                    stream,
                    self.peers.share(),
                    &|chunks: &LaneChunks<'_, B>| self.sampled(chunks, borrowing, step),
                    &added,
                )?;
                let sums = self.over_ranks(stream, sums, borrowing.len())?.into_iter();
                sums.map(|sums| Some(sums.finish()?.all)).collect()
            }
        };
        let grams = experts.zip(sums).map(|(expert, sums)| {
            let tokens = sums.tokens;
            let at = borrows.iter().position(|&it| it == expert);
            // For gate and up all borrow the same.
            let pooled = at.and_then(|at| borrowed[at.min(borrowed.len() - 1)].clone());
            let own = sums.finish();
            Grams {
                tokens,
                ..match (own, pooled) {
                    (Some(own), None) => own,
                    (Some(own), Some(pooled)) => match all {
                        true => Grams { all: pooled, ..own },
                        false => joined(own, pooled, tokens as f64 / features),
                    },
                    (None, pooled) => Grams {
                        all: pooled.expect("who has no tokens borrows"),
                        mismatch: None,
                        tokens: 0,
                    },
                }
            }
        });
        Ok(grams.collect())
    }

    /// Adds up all ranks' sums for so many experts, on each.
    fn over_ranks(
        &self,
        stream: &Stream<B>,
        sums: Option<Vec<GramSums<B>>>,
        experts: usize,
    ) -> Result<Vec<GramSums<B>>, RunError> {
        let shape = [self.block.spec().in_features(self.tap), stream.hidden];
        let none = || (0..experts).map(|_| GramSums::default()).collect();
        let sums = sums.unwrap_or_else(none);
        over_ranks(sums, shape, &self.peers, self.device)
    }

    /// The states of a chunk before the tap.
    fn flow(&self, chunk: &Chunk<B>) -> Result<Flow<B>, FormatError> {
        let flow = chunk.flow(self.device)?;
        Ok(match self.subset.start < self.tap {
            true => self.block.advance(self.subset.start..self.tap, flow),
            false => flow,
        })
    }

    /// Sums over the tokens that the router gives to each of `experts`.
    fn routed(
        &self,
        chunks: &LaneChunks<'_, B>,
        experts: Range<usize>,
    ) -> Result<Vec<GramSums<B>>, FormatError> {
        let mut sums: Vec<GramSums<B>> = experts.clone().map(|_| GramSums::default()).collect();
        for &(at, chunk) in chunks {
            let flow = self.flow(chunk)?;
            let own = flow.residual.clone();
            let inputs = self.block.expert_inputs(self.tap, self.tap, flow, None);
            if inputs.slots_of(experts.clone()).is_empty() {
                continue;
            }
            let dense = self.dense_inputs(at, &inputs)?;
            let x = inputs.of(experts.clone());
            let states = dense.map(|dense| DenseStates {
                x: dense.inputs.of(experts.clone()),
                residuals: dense
                    .end
                    .as_ref()
                    .map(|end| [end, &own].map(|states| inputs.of_tokens(states, experts.clone()))),
            });
            let weights = self.weights(&inputs, experts.clone(), x.dtype(), states.is_some());
            let starts = inputs.starts(experts.clone());
            add_each(&mut sums, &starts, x, Some(weights), states);
        }
        Ok(sums)
    }

    /// Sums over every `step`-th token of each chunk, whoever it is given to, for each of `experts`.
    fn sampled(
        &self,
        chunks: &LaneChunks<'_, B>,
        experts: &[usize],
        step: usize,
    ) -> Result<Vec<GramSums<B>>, FormatError> {
        let mut sums: Vec<GramSums<B>> = experts.iter().map(|_| GramSums::default()).collect();
        for &(_, chunk) in chunks {
            let flow = self.flow(chunk)?;
            let inputs = self.block.expert_inputs(self.tap, self.tap, flow, None);
            let Some(x) = inputs.every(0, step) else {
                continue;
            };
            for (&expert, sums) in experts.iter().zip(&mut sums) {
                let x = self.block.expert_input(self.tap, expert, x.clone());
                sums.add(x, None);
            }
        }
        Ok(sums)
    }

    /// The dense model's inputs for a chunk by the branch's choice, where it was run.
    fn dense_inputs(
        &self,
        at: usize,
        own: &ExpertInputs<B>,
    ) -> Result<Option<DenseExperts<B>>, FormatError> {
        let spec = self.block.spec();
        let first = spec.first_of_mixture(self.tap);
        let Some((dense, before)) = (self.dense).and_then(|it| Some((it, it.chunk(first, at)?)))
        else {
            return Ok(None);
        };
        let (block, routed) = (self.dense_block, own.routed().clone());
        let flow = before.flow(self.device)?;
        let end = match makes_up(spec, self.subset.clone()) == Some(self.tap) {
            false => None,
            true => {
                let after = dense
                    .chunk_after(self.tap, at)
                    .expect("a chunk for each before it");
                let [after, start] =
                    [after, before].map(|chunk| chunk.residual_stream(self.device));
                let added = block.advance_by(first..self.tap + 1, flow.clone(), routed.clone());
                // What it adds by its own choice, in place of what it would add by the branch's.
                Some(after? - added.residual + start?)
            }
        };
        let inputs = block.expert_inputs(first, self.tap, flow, Some(routed));
        Ok(Some(DenseExperts { inputs, end }))
    }

    /// Weights of the rows of some experts; those of the mismatch with `drift`.
    fn weights(
        &self,
        inputs: &ExpertInputs<B>,
        experts: Range<usize>,
        dtype: DType,
        drift: bool,
    ) -> RowWeights<B> {
        let (routed, squared) = (inputs.routed(), !self.block.spec().dispatches(self.tap));
        let (slots, top_k) = (inputs.slots_of(experts), routed.top_k());
        let of = |weight: &(dyn Fn(usize, f32) -> f32 + Sync)| {
            let weights = slots.par_iter().with_min_len(4096).map(|&slot| {
                let slot = slot as usize;
                weight(slot, routed.weights()[slot])
            });
            let weights: Vec<f32> = weights.collect();
            let n = weights.len();
            let weights = TensorData::new(weights, [n, 1]);
            Tensor::<B, 2>::from_data(weights, (self.device, DType::F32)).cast(dtype)
        };
        let share = |slot: usize, c: f32| {
            let token = slot / top_k * top_k;
            let sum: f32 = routed.weights()[token..token + top_k].iter().sum();
            if sum > 0.0 { c * c / sum } else { 0.0 }
        };
        match squared {
            true => RowWeights {
                root: of(&|_, c| c),
                drift: drift.then(|| [of(&|_, c| c * c), of(&share)]),
            },
            false => RowWeights {
                root: of(&|_, c| c.sqrt()),
                drift: drift.then(|| [of(&|_, c| c), of(&|_, c| c)]),
            },
        }
    }
}

/// The dense model's side of a chunk.
struct DenseExperts<B: Engine> {
    inputs: ExpertInputs<B>,
    /// Its residual stream at the mixture's end less what its experts add by the branch's choice, of a down projection.
    end: Option<Tensor<B, 2>>,
}

/// Adds up two lanes' sums, expert by expert.
fn added<B: Engine>(sums: Vec<GramSums<B>>, lane: Vec<GramSums<B>>) -> Vec<GramSums<B>> {
    sums.into_iter().zip(lane).map(|(a, b)| a + b).collect()
}

/// Joins an expert's own sums with what it borrows, with `tokens` for each feature.
fn joined<B: Engine>(own: Grams<B>, pooled: Tensor<B, 2>, tokens: f64) -> Grams<B> {
    let ratio = (SHARE * ENOUGH / (ENOUGH + tokens)) as f32;
    let scale = |gram: &Tensor<B, 2>| {
        let scale = trace(gram.clone()) * ratio / trace(pooled.clone());
        pooled.clone() * scale.expand(pooled.dims())
    };
    Grams {
        all: own.all.clone() + scale(&own.all),
        mismatch: own.mismatch.map(|mut drift| {
            drift.gram = drift.gram.clone() + scale(&drift.gram);
            drift
        }),
        tokens: own.tokens,
    }
}

/// The trace of a matrix, `[1, 1]`, at least the least positive number.
fn trace<B: Engine>(gram: Tensor<B, 2>) -> Tensor<B, 2> {
    let n = gram.dims()[0];
    let at: Vec<i32> = (0..n).map(|i| (i * (n + 1)) as i32).collect();
    let at = TensorData::new(at, [n]);
    let at = Tensor::<B, 1, Int>::from_data(at, (&gram.device(), DType::I32));
    let diagonal = gram.reshape([n * n]).select(0, at);
    diagonal.sum().add_scalar(f32::MIN_POSITIVE).reshape([1, 1])
}
