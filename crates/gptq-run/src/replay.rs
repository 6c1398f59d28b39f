//! Replaying: the finished blocks of an interrupted run, with the weights that it wrote. Rank 0 reads them, and sends
//! them to the others.

use std::sync::atomic::AtomicBool;

use gptq_format::Checkpoint;
use gptq_kernels::Engine;
use gptq_model::{Block, Model};
use gptq_plan::Plan;
use gptq_ranks::Collective;

use crate::block_loop::{At, Strategy};
use crate::branch_progress::BranchProgress;
use crate::gram::TapGrams;
use crate::options::check_stop;
use crate::output_errors::OutputErrors;
use crate::profile::Clock;
use crate::resume::Restored;
use crate::row_parts;
use crate::{Event, RunError};

/// Reads weights back from the branches' unfinished files.
pub(crate) struct Replay<'a, B: Engine> {
    pub(crate) plan: &'a Plan,
    pub(crate) model: &'a Model<B>,
    pub(crate) ranks: &'a dyn Collective,
    pub(crate) restored: &'a Restored,
    /// The branches' files, in the plan's order.
    pub(crate) partials: &'a [Checkpoint],
    pub(crate) progress: &'a mut [BranchProgress],
    pub(crate) stop: &'a AtomicBool,
    pub(crate) on_event: &'a mut dyn FnMut(Event<'_>),
}

impl<B: Engine> Replay<'_, B> {
    /// Checks that the files still have what was written of the first `layers` blocks, without running these.
    ///
    /// # Errors
    /// A linear is not what was written.
    pub(crate) fn reread(&mut self, layers: usize) -> Result<(), RunError> {
        if !self.ranks.is_root() {
            return Ok(());
        }
        for layer in 0..layers {
            for branch in 0..self.plan.branches.len() {
                check_stop(self.stop, self.plan.config.layers)?;
                for tap in self.plan.config.block(layer).taps() {
                    self.restore(At { layer, branch, tap }, None)?;
                }
            }
        }
        Ok(())
    }

    /// Reads the weights of a tap, and gives them to `block`.
    fn restore(&mut self, at: At, mut block: Option<&mut Block<B>>) -> Result<(), RunError> {
        let branch = at.branch;
        let restored = &self.restored.branches[branch];
        let spec = self.plan.config.block(at.layer);
        let mut codes = Vec::new();
        for linear in spec.linears_of(at.tap) {
            let module = spec.linears()[linear].module(at.layer);
            let Some(report) = restored.linear(&module) else {
                continue;
            };
            let packed = restored.read(&self.partials[branch], report)?;
            if let Some(block) = &mut block {
                let (dtype, device) = (self.model.dtype(), self.model.device());
                block.set_weight(linear, B::dequantize_packed(&packed, dtype, device));
                if self.ranks.share().size > 1 {
                    codes.push(packed.unpack());
                }
            }
            (self.on_event)(Event::Linear { branch, report });
        }
        if !codes.is_empty() {
            row_parts::send(codes.into_iter(), self.ranks)?;
        }
        Ok(())
    }
}

impl<B: Engine> Strategy<B> for Replay<'_, B> {
    fn solves(&self) -> bool {
        false
    }

    fn tap(
        &mut self,
        at: At,
        _grams: Option<TapGrams<B>>,
        _compared: Option<&OutputErrors<B>>,
        block: &mut Block<B>,
        _clock: &mut Clock,
    ) -> Result<(), RunError> {
        match self.ranks.is_root() {
            true => self.restore(at, Some(block)),
            false => {
                let place = (self.model.dtype(), self.model.device());
                Ok(row_parts::receive_tap(
                    self.plan, at, block, place, self.ranks,
                )?)
            }
        }
    }

    fn spent(&mut self, branch: usize, seconds: f64) {
        self.progress[branch].seconds += seconds;
    }
}
