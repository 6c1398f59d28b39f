//! The run: blocks in order, branches in lockstep on each loaded block.

mod finish;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use gptq_format::Checkpoint;
use gptq_kernels::{Drift, Engine, Hessian, Request};
use gptq_model::{Block, BlockSpec, Flow, Model, ModelError};

use crate::gram::{Dense, Grams};
use crate::journal::BranchBlock;
use crate::kept_states::States;
use crate::memory::Places;
use crate::model_files::ModelHash;
use crate::output_errors::OutputErrors;
use crate::profile::{Clock, Phase};
use crate::quantize::{Event, check_stop};
use crate::read_ahead::Ahead;
use crate::resume::Restored;
use crate::scratch::Scratch;
use crate::stream::{Stream, explained};
use crate::write_behind::WriteBehind;
use crate::{
    BlockReport, BranchPlan, BranchReport, Clamped, LinearReport, PipelineError, Plan,
    PlannedLinear, Propagation, hidden_range,
};

pub(crate) use finish::About;

/// The linears that a tap of block `layer` has to quantize.
fn planned(branch: &BranchPlan, layer: usize, block: &BlockSpec, tap: usize) -> Vec<PlannedLinear> {
    let linears = block.linears_of(tap);
    linears
        .filter_map(|at| branch.planned(layer, at, &block.linears()[at]))
        .collect()
}

/// A block that the branches are in, as loaded.
struct Entered<'a, B: Engine> {
    layer: usize,
    dense: Option<&'a Dense<B>>,
    compared: Option<&'a mut OutputErrors<B>>,
}

/// One branch as it grows.
#[derive(Default)]
pub(crate) struct Output {
    pub(crate) linears: Vec<LinearReport>,
    pub(crate) clamped: Vec<Clamped>,
    pub(crate) blocks: Vec<BlockReport>,
    pub(crate) seconds: f64,
    /// By block and tap, where nothing is written; see [`Stream::moved`].
    pub(crate) moved: BTreeMap<(usize, usize), f64>,
}

/// Some branches on their way through the blocks.
pub(crate) struct Run<'a, 'scope, B: Engine> {
    pub(crate) plan: &'a Plan,
    pub(crate) model: &'a Model<B>,
    pub(crate) model_hash: &'a mut ModelHash,
    /// Where what is found is written; without it, it is only measured.
    pub(crate) writer: Option<WriteBehind<'scope>>,
    /// What an earlier run did.
    pub(crate) restored: Restored,
    /// The branches' files, where there is anything to restore.
    pub(crate) partials: Vec<Checkpoint>,
    pub(crate) clock: &'a mut Clock,
    /// Whether device memory is to be given back as soon as it is unused: CubeCL's pools keep what was
    /// once needed, a pool for each range of sizes.
    pub(crate) frugal: bool,
    pub(crate) stop: &'a AtomicBool,
    /// How old the last kept hidden states may become.
    pub(crate) keep_every: Duration,
    /// When there were some last, or the run began.
    pub(crate) last_kept: Instant,
    pub(crate) outputs: Vec<Output>,
    pub(crate) on_event: &'a mut dyn FnMut(Event<'_>),
}

impl<B: Engine> Run<'_, '_, B> {
    /// Takes hidden states through all blocks, and puts every branch in place.
    pub(crate) fn carry_out(
        mut self,
        flows: impl Iterator<Item = Result<Flow<B>, ModelError>>,
        places: &Places,
        scratch: Option<&Arc<Scratch>>,
        blocks: &Receiver<Ahead>,
        about: About<'_>,
    ) -> Result<Vec<BranchReport>, PipelineError> {
        let first = self.restored.first();
        // Where only the last files were missing there is nothing to go over, only to look at.
        if self.restored.layers < self.plan.config.layers {
            let states = match self.restored.kept.take() {
                Some(kept) => {
                    self.reread(kept.layers)?;
                    kept.read(self.plan, places, scratch, self.model.device())?
                }
                None => {
                    let compare = Some(self.model.device());
                    States::begin(self.plan, flows, places, scratch, compare)?
                }
            };
            self.clock.add_start();
            self.blocks(first, states, blocks)?;
        } else {
            self.reread(self.restored.layers)?;
        }
        self.finish(about)
    }

    /// Takes hidden states through all blocks, and says what came of each branch.
    pub(crate) fn measure(
        mut self,
        flows: impl Iterator<Item = Result<Flow<B>, ModelError>>,
        places: &Places,
        scratch: Option<&Arc<Scratch>>,
        blocks: &Receiver<Ahead>,
    ) -> Result<Vec<Output>, PipelineError> {
        let states = States::begin(self.plan, flows, places, scratch, None)?;
        self.clock.add_start();
        self.blocks(0, states, blocks)?;
        Ok(self.outputs)
    }

    fn blocks(
        &mut self,
        first: usize,
        mut states: States<B>,
        blocks: &Receiver<Ahead>,
    ) -> Result<(), PipelineError> {
        let model = self.model;
        for layer in first..self.plan.config.layers {
            let (block, source) =
                self.clock
                    .measure::<B, _>(Phase::Read, model.device(), || {
                        let block = blocks
                            .recv()
                            .expect("the reader ends with an error or the last block");
                        block.map(|(block, source)| (model.upload(block), source))
                    })?;
            if let Some(dense) = &mut states.dense {
                dense.enter(&block, model.device(), self.clock)?;
            }
            if let Some(compared) = &mut states.compared {
                let solving = layer >= self.restored.layers;
                compared.enter(&block, solving, model.device(), self.clock)?;
            }
            let mut entered = Entered {
                layer,
                dense: states.dense.as_ref(),
                compared: states.compared.as_mut(),
            };
            let mut next = Vec::with_capacity(self.plan.branches.len());
            for stream in states.streams {
                let sequential = self.plan.branches[stream.branches[0]].true_sequential;
                let taps = block.spec().taps();
                let groups: Vec<Range<usize>> = match sequential {
                    true => taps.map(|tap| tap..tap + 1).collect(),
                    false => vec![taps],
                };
                self.taps(&mut entered, stream, &block, &groups, &mut next)?;
            }
            states.streams = next;
            if self.writer.is_none() {
                (self.on_event)(Event::Measured { layers: layer + 1 });
            } else if layer >= self.restored.layers {
                let kept = self.keep(layer, &states)?;
                self.record(layer, source, kept)?;
            }
        }
        Ok(())
    }

    /// Keeps the states after a block, if it is time; their digest.
    fn keep(&mut self, layer: usize, states: &States<B>) -> Result<Option<String>, PipelineError> {
        let last = layer + 1 == self.plan.config.layers;
        if last || self.last_kept.elapsed() < self.keep_every {
            return Ok(None);
        }
        let started = Instant::now();
        let kept = states.keep(self.plan, layer, self.stop)?;
        self.last_kept = Instant::now();
        self.clock
            .add(Phase::Write, started.elapsed().as_secs_f64());
        let layers = layer + 1;
        (self.on_event)(match &kept {
            Ok(_) => Event::StatesKept { layers },
            Err(why) => Event::StatesNotKept { layers, why },
        });
        Ok(kept.ok())
    }

    /// Has a finished block journalled, once it is on the disk.
    fn record(
        &mut self,
        layer: usize,
        source: String,
        states: Option<String>,
    ) -> Result<(), PipelineError> {
        let block = |output: &Output| {
            let linears = output.linears.iter().filter(|it| it.layer == layer);
            let clamped = output.clamped.iter().filter(|it| it.layer == layer);
            BranchBlock {
                seconds: output.seconds,
                linears: linears.cloned().collect(),
                clamped: clamped.cloned().collect(),
                output_error: (output.blocks.iter().find(|it| it.layer == layer))
                    .map(|block| block.output_error),
            }
        };
        let branches = self.outputs.iter().map(block).collect();
        if let Some(writer) = &mut self.writer {
            writer.finish_block(layer, source, branches, states)?;
        }
        Ok(())
    }

    /// Solves the first of `groups` for every branch of `stream`, moves on with the quantized
    /// weights, and goes on with the rest; a branch at a time, once they differ. Streams at the
    /// block's end are pushed to `done`.
    fn taps(
        &mut self,
        entered: &mut Entered<'_, B>,
        mut stream: Stream<B>,
        block: &Block<B>,
        groups: &[Range<usize>],
        done: &mut Vec<Stream<B>>,
    ) -> Result<(), PipelineError> {
        let Some((group, rest)) = groups.split_first() else {
            self.compare_block(entered, &stream.branches)?;
            done.push(stream);
            return Ok(());
        };
        check_stop(self.stop, self.plan.config.layers)?;
        self.model_hash.check()?;
        let started = Instant::now();
        let (layer, device) = (entered.layer, self.model.device());
        let asymmetric = |&branch: &usize| self.plan.branches[branch].method.asymmetric > 0.0;
        // The model's first input has not drifted; asked all the same, its Gram matrix would be summed
        // in another order, and for branches that do not ask.
        let embedded = layer == 0 && group.start == 0;
        let dense = entered
            .dense
            .filter(|_| !embedded && stream.branches.iter().any(asymmetric));
        // A block of an earlier run needs none: its codes are known.
        let grams = (layer >= self.restored.layers)
            .then(|| stream.grams(block, group.clone(), dense, device, self.clock))
            .transpose()?;
        let branches = std::mem::take(&mut stream.branches);
        let shared = started.elapsed().as_secs_f64() / branches.len() as f64;
        let mut parent = Some(stream);
        for (i, &branch) in branches.iter().enumerate() {
            let started = Instant::now();
            let mut quantized = block.clone();
            for (at, tap) in group.clone().enumerate() {
                match &grams {
                    Some(grams) => {
                        let grams = grams[at].clone();
                        self.solve(entered, branch, tap, grams, &mut quantized)
                            .map_err(|error| explained(error, parent.as_ref(), device))?;
                    }
                    None => self.restore(layer, branch, tap, Some(&mut quantized))?,
                }
                if let Some(compared) = &mut entered.compared {
                    compared.advance(branch, tap, &quantized, device, self.clock)?;
                }
            }
            if let (None, Some(stream)) = (&self.writer, &parent) {
                let moved = stream.moved(block, &quantized, group.start, device, self.clock)?;
                let at = (layer, group.start);
                self.outputs[branch].moved.insert(at, moved);
            }
            if self.plan.propagation == Propagation::Dense {
                self.outputs[branch].seconds += shared + started.elapsed().as_secs_f64();
                continue;
            }
            // The last branch takes the parent's states over; the others share them.
            let mut own = match i + 1 < branches.len() {
                true => parent.clone(),
                false => parent.take(),
            }
            .expect("taken only by the last branch");
            own.branches = vec![branch];
            let (own, clamped) = own.advance(&quantized, group.clone(), device, self.clock)?;
            self.note_clamped(layer, group, &[branch], clamped);
            if self.frugal {
                B::release_memory(device);
            }
            self.outputs[branch].seconds += shared + started.elapsed().as_secs_f64();
            self.taps(entered, own, &quantized, rest, done)?;
        }
        if let Some(mut stream) = parent {
            stream.branches = branches;
            let (stream, clamped) = stream.advance(block, group.clone(), device, self.clock)?;
            self.note_clamped(layer, group, &stream.branches, clamped);
            self.taps(entered, stream, block, rest, done)?;
        }
        Ok(())
    }

    /// Notes how far the output of the block that `branches` have been through is from the dense model's.
    fn compare_block(
        &mut self,
        entered: &Entered<'_, B>,
        branches: &[usize],
    ) -> Result<(), PipelineError> {
        let layer = entered.layer;
        let solved = layer >= self.restored.layers;
        if let Some(compared) = entered.compared.as_ref().filter(|_| solved) {
            for &branch in branches {
                let output_error = compared.block(branch, self.model.device())?;
                let report = &BlockReport {
                    layer,
                    output_error,
                };
                (self.on_event)(Event::Block { branch, report });
                self.outputs[branch].blocks.push(*report);
            }
        }
        Ok(())
    }

    fn note_clamped(
        &mut self,
        layer: usize,
        taps: &Range<usize>,
        branches: &[usize],
        values: usize,
    ) {
        // An earlier run's block has its own record.
        if values > 0 && layer >= self.restored.layers {
            let block = self.plan.config.block(layer);
            let after = hidden_range::after(block, taps.clone());
            for &branch in branches {
                self.outputs[branch].clamped.push(Clamped {
                    layer,
                    after: after.clone(),
                    values,
                });
            }
        }
    }

    /// Quantizes one tap's linears for one branch: codes to its files, weights into `block`.
    fn solve(
        &mut self,
        entered: &Entered<'_, B>,
        branch: usize,
        tap: usize,
        grams: Grams<B>,
        block: &mut Block<B>,
    ) -> Result<(), PipelineError> {
        let layer = entered.layer;
        check_stop(self.stop, self.plan.config.layers)?;
        let settings = &self.plan.branches[branch];
        let linears = planned(settings, layer, block.spec(), tap);
        if linears.is_empty() {
            return Ok(());
        }
        let modules = || {
            let modules = linears.iter().map(|linear| linear.module.as_str());
            modules.collect::<Vec<_>>().join(", ")
        };
        let request = |linear: &PlannedLinear| Request {
            weight: block.linear(linear.linear).weight.dense(self.model.dtype()),
            settings: linear.settings,
        };
        let requests = linears.iter().map(request).collect();
        let hessian = Hessian {
            act_order: settings.desc_act,
            damping: settings.damp_percent,
        };
        let strength = settings.method.asymmetric;
        let drift = grams.drift.filter(|_| strength > 0.0);
        let drift = drift.map(|[gram, cross]| Drift {
            gram,
            cross,
            strength,
        });
        let started = Instant::now();
        let format = settings.format();
        let subset = B::solve(grams.all, drift, hessian, requests, format).map_err(|source| {
            PipelineError::Solver {
                branch: settings.name.clone(),
                modules: modules(),
                source: Box::new(source),
            }
        })?;
        let most = self.plan.numerics.max_damping;
        if subset.damping > most {
            return Err(PipelineError::Damping {
                branch: settings.name.clone(),
                modules: modules(),
                needed: subset.damping,
                most,
            });
        }
        let seconds = started.elapsed().as_secs_f64();
        let packing = subset.times.pack;
        self.clock.add(Phase::Factor, subset.times.factor);
        self.clock.add(Phase::Pack, packing);
        self.clock
            .add(Phase::Sweep, seconds - subset.times.factor - packing);
        let seconds = seconds / linears.len() as f64;
        let errors = match &entered.compared {
            Some(compared) => {
                let weights = subset.solved.iter().map(|it| [&it.weight, &it.nearest]);
                let solved: Vec<_> = linears.iter().map(|it| it.linear).zip(weights).collect();
                let device = self.model.device();
                compared.linears(branch, tap, block, &solved, device, self.clock)?
            }
            None => Vec::new(),
        };
        let mut errors = errors.into_iter();
        for (linear, solved) in linears.into_iter().zip(subset.solved) {
            let errors = errors.next();
            let started = Instant::now();
            if let Some(writer) = &mut self.writer {
                writer.write(branch, linear.module.clone(), solved.packed)?;
            }
            let waited = started.elapsed().as_secs_f64();
            self.clock.add(Phase::Write, waited);
            block.set_weight(linear.linear, solved.weight);
            let (n_in, n_out) = linear.shape;
            let report = LinearReport {
                layer,
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
                solver_objective: Some(solved.objective),
                gains: solved.gains,
                damp_percent: subset.damping,
                dead_columns: subset.dead_columns,
                seconds,
                digests: None,
            };
            (self.on_event)(Event::Linear {
                branch,
                report: &report,
            });
            self.outputs[branch].linears.push(report);
        }
        Ok(())
    }

    /// Looks whether the files still have what an earlier run wrote of the blocks before `layers`.
    fn reread(&mut self, layers: usize) -> Result<(), PipelineError> {
        for layer in 0..layers {
            for branch in 0..self.plan.branches.len() {
                check_stop(self.stop, self.plan.config.layers)?;
                for tap in self.plan.config.block(layer).taps() {
                    self.restore(layer, branch, tap, None)?;
                }
            }
        }
        Ok(())
    }

    /// Reads the weights that an earlier run found for a tap of one branch, and gives them to
    /// `block`.
    fn restore(
        &mut self,
        layer: usize,
        branch: usize,
        tap: usize,
        mut block: Option<&mut Block<B>>,
    ) -> Result<(), PipelineError> {
        let device = self.model.device();
        let restored = &self.restored.branches[branch];
        let spec = self.plan.config.block(layer);
        for linear in spec.linears_of(tap) {
            let module = spec.linears()[linear].module(layer);
            let Some(report) = restored.linear(&module) else {
                continue;
            };
            let packed = restored.read(&self.partials[branch], report)?;
            if let Some(block) = &mut block {
                let dtype = self.model.dtype();
                block.set_weight(linear, B::dequantize(&packed, dtype, device));
            }
            (self.on_event)(Event::Linear { branch, report });
        }
        Ok(())
    }
}
