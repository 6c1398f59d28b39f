//! Tuning of the linears of a block that a branch is through.

use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, Tunable};
use gptq_model::{Block, Model};
use gptq_plan::{Plan, Tuning};

use crate::RunError;
use crate::options::check_stop;
use crate::solved_tap::{SolvedTap, Waiting, acts};
use crate::tuning::{Tuned, TuningSet, tune};
use crate::tuning_loss::BlockLoss;
use crate::tuning_states::TuningStates;

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

/// Parts of the run that tuning a block needs.
pub(crate) struct BlockTuning<'a, B: Engine> {
    pub(crate) plan: &'a Plan,
    pub(crate) model: &'a Model<B>,
    pub(crate) stop: &'a AtomicBool,
}

impl<B: Engine> BlockTuning<'_, B> {
    /// Tunes the linears in `waiting`, whose weights the second of the blocks has, the first the dense ones; `None` if there
    /// is nothing to tune. They stay as they are if that comes no closer.
    pub(crate) fn run(
        &self,
        (layer, branch): (usize, usize),
        [dense_block, quantized]: [&Block<B>; 2],
        windows: &TuningStates<B>,
        waiting: &mut VecDeque<Waiting<B>>,
    ) -> Result<Option<Tuning>, RunError> {
        let device = self.model.device();
        let all = waiting.iter().flat_map(|it| &it.solved.linears);
        let linears: Vec<usize> = all.map(|it| it.linear).collect();
        // A linear of zeros stays one: its block is not to make up for others.
        let mut acting = acting(dense_block, &linears, self.model.dtype()).into_iter();
        let mut tuned: Vec<Tuned<B>> = Vec::new();
        for waiting in waiting.iter_mut() {
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
            return Ok(None);
        }
        let TuningStates { start, dense } = windows;
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
        let mut tuned = tuned.into_iter().peekable();
        for waiting in waiting.iter_mut().filter(|_| closer) {
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
        Ok(Some(tuning))
    }
}
