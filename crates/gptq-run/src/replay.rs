//! Replaying: the finished blocks of an interrupted run, with the weights that it wrote. Rank 0 reads them, and sends
//! them to the others.

use std::sync::atomic::AtomicBool;

use gptq_format::Checkpoint;
use gptq_kernels::Engine;
use gptq_model::{Block, Model};
use gptq_plan::Plan;

use crate::block_loop::{At, Strategy};
use crate::branch_progress::BranchProgress;
use crate::gram::TapGrams;
use crate::options::check_stop;
use crate::output_errors::OutputErrors;
use crate::peers::Peers;
use crate::profile::Clock;
use crate::resume::Restored;
use crate::tap_weights::{receive_tap, send_tap};
use crate::{Event, RunError};

/// Reads weights back from the branches' unfinished files.
pub(crate) struct Replay<'a, B: Engine> {
    pub(crate) plan: &'a Plan,
    pub(crate) model: &'a Model<B>,
    pub(crate) peers: Peers<'a, B>,
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
        if !self.peers.is_root() {
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
        let mut restored_linears = Vec::new();
        for linear in spec.linears_of(at.tap) {
            let module = spec.linears()[linear].module(at.layer);
            let Some(report) = restored.linear(&module) else {
                continue;
            };
            let packed = restored.read(&self.partials[branch], report)?;
            if let Some(block) = &mut block {
                let (dtype, device) = (self.model.dtype(), self.model.device());
                let weight = B::dequantize_packed(&packed, dtype, device);
                block.set_weight(linear, weight.clone());
                if self.peers.share().size > 1 {
                    restored_linears.push((weight, packed));
                }
            }
            (self.on_event)(Event::Linear { branch, report });
        }
        if restored_linears.is_empty() {
            return Ok(());
        }
        let linears = restored_linears.into_iter();
        send_tap(
            linears.map(|(weight, packed)| (weight, move || packed.unpack())),
            &self.peers,
        )
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
        match self.peers.is_root() {
            true => self.restore(at, Some(block)),
            false => {
                let place = (self.model.dtype(), self.model.device());
                receive_tap(self.plan, at, block, place, &self.peers)
            }
        }
    }

    fn spent(&mut self, branch: usize, seconds: f64) {
        self.progress[branch].seconds += seconds;
    }
}
