//! Solving a branch that is tuned: its linears wait until the block's end, and are handed on as tuning leaves them.

use std::time::Instant;

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, Tunable};
use gptq_model::Block;

use super::{Solve, SolvedTap, acts, row_parts};
use crate::RunError;
use crate::block_loop::At;
use crate::gram::Dense;
use crate::options::check_stop;
use crate::output_errors::OutputErrors;
use crate::profile::{Clock, Phase};
use crate::stream::Stream;
use crate::tuning::{Tuned, TuningSet, tune};
use crate::tuning_loss::BlockLoss;
use crate::tuning_states::TuningStates;

/// A solved tap of a branch that is tuned.
pub(crate) struct Waiting<B: Engine> {
    pub(crate) tap: usize,
    pub(crate) solved: SolvedTap<B>,
    /// `XᵀX` of its input, upper triangle.
    pub(crate) gram: Tensor<B, 2>,
}

/// Returns for each linear layer whether it does anything; waits for the device.
fn acting<B: Engine>(block: &Block<B>, linears: &[usize], dtype: DType) -> Vec<bool> {
    if linears.is_empty() {
        return Vec::new();
    }
    let all = linears.iter();
    let all = all.map(|&linear| acts(block.linear(linear).weight.dense(dtype)));
    let values = Tensor::cat(all.collect(), 0).into_data();
    values.iter::<f32>().map(|value| value != 0.0).collect()
}

impl<B: Engine> Solve<'_, B> {
    /// Gives `block` the tuned weights of a tap, which rank 0 hands on and sends to the others.
    pub(crate) fn tuned_tap(
        &mut self,
        at: At,
        compared: Option<&OutputErrors<B>>,
        block: &mut Block<B>,
        clock: &mut Clock,
    ) -> Result<(), RunError> {
        if !self.ranks.is_root() {
            let place = (self.model.dtype(), self.model.device());
            return Ok(row_parts::receive_tap(
                self.plan, at, block, place, self.ranks,
            )?);
        }
        let Some(waiting) = self.waiting.pop_front_if(|it| it.tap == at.tap) else {
            return Ok(());
        };
        let solved = vec![waiting.solved];
        let linears = solved.iter().flat_map(|it| &it.subset.solved);
        row_parts::send(linears.map(|it| it.codes.clone().download()), self.ranks)?;
        self.hand_on(at, solved, compared, block, clock)
    }

    /// Tunes a block that a branch is through, on rank 0.
    pub(crate) fn tune_block(
        &mut self,
        (layer, branch): (usize, usize),
        [dense_block, quantized]: [&Block<B>; 2],
        start: &Stream<B>,
        dense: &Dense<B>,
        clock: &mut Clock,
    ) -> Result<(), RunError> {
        // The block is run again: what was clamped in it so far does not count.
        let clamped = &mut self.progress[branch].clamped;
        clamped.retain(|it| it.layer != layer);
        let device = self.model.device();
        // Rank 0 tunes, on all ranks' windows: a step's gradients are as large as the block, and there are many steps.
        let windows = TuningStates::gather(start, dense, self.ranks)?;
        let Some(TuningStates { start, dense }) = &windows else {
            return Ok(());
        };
        let started = Instant::now();
        let waiting = self.waiting.iter().flat_map(|it| &it.solved.linears);
        let linears: Vec<usize> = waiting.map(|it| it.linear).collect();
        // A linear of zeros stays one: its block is not to make up for others.
        let mut acting = acting(dense_block, &linears, self.model.dtype()).into_iter();
        let mut tuned: Vec<Tuned<B>> = Vec::new();
        for waiting in &mut self.waiting {
            let SolvedTap {
                linears, subset, ..
            } = &mut waiting.solved;
            for (linear, solved) in linears.iter().zip(&mut subset.solved) {
                let unrounded = solved.unrounded.take();
                let unrounded = unrounded.expect("asked for where a branch is tuned");
                if acting.next() == Some(true) {
                    tuned.push(Tuned {
                        linear: linear.linear,
                        bits: linear.settings.bits,
                        parameters: Tunable::new(solved.codes.clone(), unrounded),
                    });
                }
            }
        }
        if tuned.is_empty() {
            return Ok(());
        }
        let windows = TuningSet::new(
            start,
            dense,
            self.plan.step_windows(),
            self.model.dtype(),
            device,
        );
        let steps = self.plan.branches[branch].method.tune;
        let (stop, layers) = (self.stop, self.plan.config.layers);
        let check = &mut || check_stop(stop, layers);
        let mut block = quantized.clone();
        let loss = match layer + 1 == layers {
            true => BlockLoss::Predictions(self.model.head()?),
            false => BlockLoss::Output,
        };
        let (tuning, closer) = tune(&windows, &loss, steps, &mut block, &mut tuned, check)?;
        self.tuning = Some(tuning);
        let mut tuned = tuned.into_iter().peekable();
        for waiting in self.waiting.iter_mut().filter(|_| closer) {
            let SolvedTap {
                linears, subset, ..
            } = &mut waiting.solved;
            for (linear, solved) in linears.iter().zip(&mut subset.solved) {
                let Some(tuned) = tuned.next_if(|it| it.linear == linear.linear) else {
                    continue;
                };
                let weight =
                    |block: &Block<B>| block.linear(tuned.linear).weight.dense(self.model.dtype());
                solved.codes = B::tuned(&tuned.parameters);
                solved.weight = weight(&block);
                let gram = waiting.gram.clone();
                solved.relative_error =
                    B::relative_error(gram, weight(dense_block), weight(&block));
                solved.objective = None;
            }
        }
        clock.add(Phase::Tune, started.elapsed().as_secs_f64());
        Ok(())
    }
}
