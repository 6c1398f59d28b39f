//! Errors of experts' outputs relative to the dense model's, on the compared tokens.
//!
//! Measured as in `output_errors.rs`, with the tokens that the branch's router gives the expert, for both models; with all of
//! the compared ones if it is given none.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use gptq_format::FormatError;
use gptq_kernels::{Engine, Routed};
use gptq_model::{Block, ExpertInputs};

use crate::gram::Dense;
use crate::linear_errors::{LinearErrors, part};
use crate::moved::squares;
use crate::stream::Stream;

/// A linear by its index in the block, with its solved and its nearest weights.
pub(crate) type SolvedLinear<'a, B> = (usize, [&'a Tensor<B, 2>; 2]);

/// A tap of experts on the compared tokens.
pub(crate) struct ExpertErrors<'a, B: Engine> {
    /// The block with the branch's weights up to the tap, and the dense one.
    pub(crate) blocks: [&'a Block<B>; 2],
    pub(crate) tap: usize,
    pub(crate) dense: &'a Dense<B>,
    pub(crate) own: &'a Stream<B>,
    pub(crate) device: &'a B::Device,
}

/// Inputs of a chunk, of the branch and of the dense model by the branch's choice.
type Pair<B> = [ExpertInputs<B>; 2];

impl<B: Engine> ExpertErrors<'_, B> {
    /// Returns the errors of `solved`, which are in the block's order.
    pub(crate) fn of(
        &self,
        solved: &[SolvedLinear<'_, B>],
    ) -> Result<Vec<LinearErrors>, FormatError> {
        let spec = self.blocks[0].spec();
        let first = spec.first_of_mixture(self.tap);
        let chunks = self.own.chunks.iter().zip(&self.dense.before(first).chunks);
        let pairs = chunks.map(|(own, dense)| {
            let (own, dense) = (own.flow(self.device)?, dense.flow(self.device)?);
            let own = self.blocks[0].expert_inputs(self.tap, self.tap, own, None);
            let routed: Arc<Routed> = own.routed().clone();
            let dense = self.blocks[1].expert_inputs(first, self.tap, dense, Some(routed));
            Ok([own, dense])
        });
        let pairs: Vec<Pair<B>> = pairs.collect::<Result<_, FormatError>>()?;
        let each = spec.linears_of(self.tap).len() / spec.inputs(self.tap);
        let start = spec.linears_of(self.tap).start;
        let expert_of = |linear: usize| (linear - start) / each;
        let mut numbers = Vec::new();
        for linears in solved.chunk_by(|a, b| expert_of(a.0) == expert_of(b.0)) {
            numbers.push(self.expert(expert_of(linears[0].0), linears, &pairs));
        }
        // All are brought over at once: each time the host waits, the device runs dry.
        let numbers = Tensor::cat(numbers, 0).into_data();
        let numbers = numbers.as_slice::<f32>().expect("the sums are f32");
        let errors = numbers.chunks_exact(3).map(|sums| {
            let [output, nearest, energy] = [0, 1, 2].map(|at| f64::from(sums[at]));
            LinearErrors {
                output: part(output, energy),
                nearest: part(nearest, energy),
            }
        });
        Ok(errors.collect())
    }

    /// The three sums of each of an expert's linears, one after the other: `[3 linears, 1]`.
    fn expert(
        &self,
        expert: usize,
        linears: &[SolvedLinear<'_, B>],
        pairs: &[Pair<B>],
    ) -> Tensor<B, 2> {
        let given = pairs.iter().any(|[own, _]| !own.slots(expert).is_empty());
        let zero = || Tensor::<B, 2>::zeros([1, 1], (self.device, DType::F32));
        let mut sums = vec![zero(); 3 * linears.len()];
        for pair in pairs {
            let Some([own, dense]) = self.rows(expert..expert + 1, pair, given) else {
                continue;
            };
            let mismatch = own.clone() - dense.clone();
            for ((linear, weights), sums) in linears.iter().zip(sums.chunks_exact_mut(3)) {
                let weight = self.blocks[1].linear(*linear).weight.dense(own.dtype());
                let product =
                    |x: &Tensor<B, 2>, w: Tensor<B, 2>| B::matmul_nt(x.clone(), w).cast(DType::F32);
                let shift = product(&mismatch, weight.clone());
                let lost = weights
                    .map(|rounded| product(&own, rounded.clone() - weight.clone()) + shift.clone());
                let [output, nearest] = lost;
                let all = [output, nearest, product(&dense, weight)];
                for (sum, y) in sums.iter_mut().zip(all) {
                    *sum = sum.clone() + squares(y).sum_dim(0);
                }
            }
        }
        Tensor::cat(sums, 0)
    }

    /// An expert's rows in a chunk, of both models: those it is given, or those of all tokens.
    fn rows(&self, expert: Range<usize>, pair: &Pair<B>, given: bool) -> Option<[Tensor<B, 2>; 2]> {
        let at = expert.start;
        if given {
            let any = !pair[0].slots(at).is_empty();
            return any.then(|| [0, 1].map(|which| pair[which].of(expert.clone())));
        }
        let all = [0, 1].map(|which| {
            let tokens = pair[which].every(0, 1)?;
            Some(self.blocks[which].expert_input(self.tap, at, tokens))
        });
        let [own, dense] = all;
        own.zip(dense).map(|(own, dense)| [own, dense])
    }
}
