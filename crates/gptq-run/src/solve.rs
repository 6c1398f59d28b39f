//! Solving: the linears at a tap quantized from the Gram matrix of their input, and written.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use gptq_kernels::{Engine, Incoming};
use gptq_model::{Block, Model};
use gptq_plan::{BlockReport, BranchBlock, Clamped, LinearReport, Plan, Tuning};

use crate::block_loop::{At, Strategy};
use crate::block_tuning::BlockTuning;
use crate::branch_progress::BranchProgress;
use crate::gram::{Dense, TapGrams};
use crate::linear_errors::LinearErrors;
use crate::output_errors::OutputErrors;
use crate::peers::Peers;
use crate::profile::{Clock, Phase};
use crate::solve_tap::{SharedSolve, solve};
use crate::solved_tap::{SolvedTap, Waiting};
use crate::states::States;
use crate::stream::Stream;
use crate::tap_weights::{receive_tap, send_tap};
use crate::tuning_states::TuningStates;
use crate::{Event, RunError, hidden_range, saved_states};
use gptq_format::FormatError;

/// Takes what is solved; on the disk, [`WriteBehind`](crate::write_behind::WriteBehind).
pub(crate) trait SolvedSink {
    /// Takes a linear of a branch.
    fn linear(
        &mut self,
        branch: usize,
        module: String,
        packed: Incoming,
    ) -> Result<(), FormatError>;

    /// Takes the record of a block whose linears were all taken.
    fn block(
        &mut self,
        layer: usize,
        source: String,
        branches: Vec<BranchBlock>,
        states: Option<String>,
    ) -> Result<(), FormatError>;
}

/// Finds weights together with the other ranks; on rank 0, hands them to a [`SolvedSink`] and reports them.
pub(crate) struct Solve<'a, B: Engine> {
    pub(crate) plan: &'a Plan,
    pub(crate) model: &'a Model<B>,
    /// The sink of rank 0.
    pub(crate) sink: Option<&'a mut dyn SolvedSink>,
    pub(crate) peers: Peers<'a, B>,
    /// Progress of each branch, in the plan's order.
    pub(crate) progress: &'a mut [BranchProgress],
    /// The age of the last saved hidden states at which they are saved again.
    pub(crate) save_every: Duration,
    /// Time at which hidden states were last saved, or the run began.
    pub(crate) last_saved: Instant,
    pub(crate) stop: &'a AtomicBool,
    pub(crate) on_event: &'a mut dyn FnMut(Event<'_>),
    /// Taps of the block that a branch is in which are solved, but handed on only once they are tuned.
    pub(crate) waiting: VecDeque<Waiting<B>>,
    /// Tuning of the block that a branch is in.
    pub(crate) tuning: Option<Tuning>,
}

impl<B: Engine> Solve<'_, B> {
    /// Gives `block` the tuned weights of a tap, which rank 0 hands on and sends to the others.
    fn tuned_tap(
        &mut self,
        at: At,
        compared: Option<&OutputErrors<B>>,
        block: &mut Block<B>,
        clock: &mut Clock,
    ) -> Result<(), RunError> {
        if !self.peers.is_root() {
            let place = (self.model.dtype(), self.model.device());
            return receive_tap(self.plan, at, block, place, &self.peers);
        }
        let Some(waiting) = self.waiting.pop_front_if(|it| it.tap == at.tap) else {
            return Ok(());
        };
        let solved = vec![waiting.solved];
        let linears = solved.iter().flat_map(|it| &it.subset.solved);
        let linears = linears.map(|it| (it.weight.clone(), move || it.codes.clone().download()));
        send_tap(linears, &self.peers)?;
        self.hand_on(at, solved, compared, block, clock)
    }

    /// True if a branch's codes and scales are tuned.
    pub(crate) fn tuned(&self, branch: usize) -> bool {
        self.plan.branches[branch].method.tune > 0
    }

    /// Compares, packs, writes and reports the linears of a tap, and gives `block` their weights.
    pub(crate) fn hand_on(
        &mut self,
        at: At,
        solved: Vec<SolvedTap<B>>,
        compared: Option<&OutputErrors<B>>,
        block: &mut Block<B>,
        clock: &mut Clock,
    ) -> Result<(), RunError> {
        let errors = match compared {
            Some(compared) => {
                let linears = solved.iter().flat_map(|it| {
                    let weights = it.subset.solved.iter();
                    let weights = weights.map(|it| [&it.weight, &it.nearest]);
                    it.linears.iter().map(|it| it.linear).zip(weights)
                });
                let linears: Vec<_> = linears.collect();
                let device = self.model.device();
                compared.linears(at.branch, at.tap, block, &linears, device, clock)?
            }
            None => Vec::new(),
        };
        let mut errors = errors.into_iter();
        for solved in solved {
            let errors = errors.by_ref().take(solved.linears.len()).collect();
            self.hand_on_input(at, solved, errors, block, clock)?;
        }
        Ok(())
    }

    /// Packs, writes and reports linears that share an input, and gives `block` their weights.
    fn hand_on_input(
        &mut self,
        at: At,
        solved: SolvedTap<B>,
        errors: Vec<LinearErrors>,
        block: &mut Block<B>,
        clock: &mut Clock,
    ) -> Result<(), RunError> {
        let SolvedTap {
            linears,
            subset,
            seconds,
        } = solved;
        let seconds = seconds / linears.len() as f64;
        let mut errors = errors.into_iter();
        for (linear, solved) in linears.into_iter().zip(subset.solved) {
            let errors = errors.next();
            let started = Instant::now();
            let packed = B::pack(solved.codes);
            let queued = Instant::now();
            if let Some(sink) = &mut self.sink {
                sink.linear(at.branch, linear.module.clone(), packed)?;
            }
            clock.add(Phase::Pack, (queued - started).as_secs_f64());
            clock.add(Phase::Write, queued.elapsed().as_secs_f64());
            block.set_weight(linear.linear, solved.weight);
            let (n_in, n_out) = linear.shape;
            let report = LinearReport {
                layer: at.layer,
                name: linear.module,
                shape: [n_out, n_in],
                bits: linear.settings.bits,
                group_size: linear.settings.group_size,
                relative_error: solved.relative_error,
                rtn_error: solved.rtn_error,
                ratio: match solved.rtn_error {
                    0.0 => 1.0,
                    rtn => solved.relative_error / rtn,
                },
                output_error: errors.map(|errors| errors.output),
                rtn_output_error: errors.map(|errors| errors.nearest),
                solver_objective: solved.objective,
                gains: solved.gains,
                damp_percent: subset.damping,
                dead_columns: subset.dead_columns,
                seconds,
                digests: None,
            };
            (self.on_event)(Event::Linear {
                branch: at.branch,
                report: &report,
            });
            self.progress[at.branch].linears.push(report);
        }
        Ok(())
    }
}

impl<B: Engine> Strategy<B> for Solve<'_, B> {
    fn solves(&self) -> bool {
        true
    }

    fn tap(
        &mut self,
        at: At,
        grams: Option<TapGrams<B>>,
        compared: Option<&OutputErrors<B>>,
        block: &mut Block<B>,
        clock: &mut Clock,
    ) -> Result<(), RunError> {
        let Some(grams) = grams else {
            return self.tuned_tap(at, compared, block, clock);
        };
        if block.spec().dispatches(at.tap) {
            let tokens = grams.of.iter().map(|grams| grams.tokens);
            self.progress[at.branch].expert_tokens.extend(tokens);
        }
        // A branch with experts is not tuned, so that there is one input.
        let gram = self.tuned(at.branch).then(|| grams.of[0].all.clone());
        let solved = match solve(self.plan, self.model, at, grams, block, &self.peers, clock)? {
            SharedSolve::Solved(solved) => solved,
            SharedSolve::Weights(weights) => {
                for (linear, weight) in weights {
                    block.set_weight(linear, weight);
                }
                return Ok(());
            }
        };
        let Some(gram) = gram else {
            return self.hand_on(at, solved, compared, block, clock);
        };
        for solved in solved {
            for (linear, solved) in solved.linears.iter().zip(&solved.subset.solved) {
                block.set_weight(linear.linear, solved.weight.clone());
            }
            let (tap, gram) = (at.tap, gram.clone());
            self.waiting.push_back(Waiting { tap, solved, gram });
        }
        Ok(())
    }

    fn tunes(&self, branch: usize) -> bool {
        self.tuned(branch)
    }

    fn tune(
        &mut self,
        layer: usize,
        branch: usize,
        blocks: [&Block<B>; 2],
        start: &Stream<B>,
        dense: &Dense<B>,
        clock: &mut Clock,
    ) -> Result<(), RunError> {
        // The block is run again: what was clamped in it so far does not count.
        let clamped = &mut self.progress[branch].clamped;
        clamped.retain(|it| it.layer != layer);
        // Rank 0 tunes, on all ranks' windows: a step's gradients are as large as the block, and there are many steps.
        let windows = TuningStates::gather(start, dense, self.peers.ranks)?;
        if let Some(windows) = &windows {
            let started = Instant::now();
            let tuning = BlockTuning {
                plan: self.plan,
                model: self.model,
                stop: self.stop,
            };
            self.tuning = tuning.run((layer, branch), blocks, windows, &mut self.waiting)?;
            clock.add(Phase::Tune, started.elapsed().as_secs_f64());
        }
        Ok(())
    }

    fn spent(&mut self, branch: usize, seconds: f64) {
        self.progress[branch].seconds += seconds;
    }

    fn clamped(&mut self, layer: usize, taps: Range<usize>, branches: &[usize], values: usize) {
        let after = hidden_range::after(self.plan.config.block(layer), taps);
        for &branch in branches {
            self.progress[branch].clamped.push(Clamped {
                layer,
                after: after.clone(),
                values,
            });
        }
    }

    fn branch_end(
        &mut self,
        layer: usize,
        branch: usize,
        compared: Option<&OutputErrors<B>>,
    ) -> Result<(), RunError> {
        let expert_tokens = std::mem::take(&mut self.progress[branch].expert_tokens);
        let Some(compared) = compared else {
            return Ok(());
        };
        let output_error = compared.block(branch, self.model.device())?;
        let report = &BlockReport {
            layer,
            output_error,
            tuning: self.tuning.take(),
            expert_tokens,
        };
        (self.on_event)(Event::Block { branch, report });
        self.progress[branch].blocks.push(report.clone());
        Ok(())
    }

    /// Saves the hidden states, if it is time, and hands on the block's record.
    fn block_end(
        &mut self,
        layer: usize,
        source: String,
        states: &States<B>,
        clock: &mut Clock,
    ) -> Result<(), RunError> {
        let last = layer + 1 == self.plan.config.layers;
        let due = !last && self.last_saved.elapsed() >= self.save_every;
        let due = self.peers.broadcast(vec![u8::from(due)])? == [1];
        let kept = if !due {
            None
        } else {
            let started = Instant::now();
            let kept = saved_states::keep(states, self.plan, layer, self.peers.ranks, self.stop)?;
            self.last_saved = Instant::now();
            clock.add(Phase::Write, started.elapsed().as_secs_f64());
            let layers = layer + 1;
            (self.on_event)(match &kept {
                Ok(_) => Event::StatesSaved { layers },
                Err(why) => Event::StatesNotSaved { layers, why },
            });
            kept.ok()
        };
        let branches = self.progress.iter().map(|branch| branch.block(layer));
        if let Some(sink) = &mut self.sink {
            sink.block(layer, source, branches.collect(), kept)?;
        }
        Ok(())
    }
}
