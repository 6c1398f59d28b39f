//! Probing: how far a block's output moves when the linears at one tap alone are quantized.

use std::collections::BTreeMap;

use gptq_kernels::Engine;
use gptq_model::{Block, Model};
use gptq_plan::Plan;

use crate::block_loop::{At, Strategy};
use crate::gram::TapGrams;
use crate::moved::moved;
use crate::output_errors::OutputErrors;
use crate::peers::Peers;
use crate::profile::Clock;
use crate::solve_tap::{SharedSolve, solve};
use crate::solved_tap::SolvedTap;
use crate::states::States;
use crate::stream::Stream;
use crate::{Event, RunError};

/// Solves and measures, and writes nothing.
pub(crate) struct Probe<'a, B: Engine> {
    pub(crate) plan: &'a Plan,
    pub(crate) model: &'a Model<B>,
    pub(crate) peers: Peers<'a, B>,
    /// Change of the block's output in each branch, by block and tap, as [`moved`] computes it.
    pub(crate) moved: Vec<BTreeMap<(usize, usize), f64>>,
    pub(crate) on_event: &'a mut dyn FnMut(Event<'_>),
}

impl<B: Engine> Strategy<B> for Probe<'_, B> {
    fn solves(&self) -> bool {
        true
    }

    fn tap(
        &mut self,
        at: At,
        grams: Option<TapGrams<B>>,
        _compared: Option<&OutputErrors<B>>,
        block: &mut Block<B>,
        clock: &mut Clock,
    ) -> Result<(), RunError> {
        let grams = grams.expect("the loop has Gram matrices for whom solves");
        let solved = match solve(self.plan, self.model, at, grams, block, &self.peers, clock)? {
            SharedSolve::Solved(solved) => solved,
            SharedSolve::Weights(weights) => {
                for (linear, weight) in weights {
                    block.set_weight(linear, weight);
                }
                return Ok(());
            }
        };
        for SolvedTap {
            linears, subset, ..
        } in solved
        {
            for (linear, solved) in linears.into_iter().zip(subset.solved) {
                block.set_weight(linear.linear, solved.weight);
            }
        }
        Ok(())
    }

    fn subset_done(
        &mut self,
        at: At,
        dense: &Block<B>,
        quantized: &Block<B>,
        stream: &Stream<B>,
        clock: &mut Clock,
    ) -> Result<(), RunError> {
        let device = self.model.device();
        let distance = moved(
            stream,
            dense,
            quantized,
            at.tap,
            (self.peers.ranks, device),
            clock,
        )?;
        self.moved[at.branch].insert((at.layer, at.tap), distance);
        Ok(())
    }

    fn block_end(
        &mut self,
        layer: usize,
        _source: String,
        _states: &States<B>,
        _clock: &mut Clock,
    ) -> Result<(), RunError> {
        (self.on_event)(Event::Measured { layers: layer + 1 });
        Ok(())
    }
}
