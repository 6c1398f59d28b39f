//! The run: blocks in order, branches in lockstep on each loaded block.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::{Scope, scope};
use std::time::Instant;

use burn::tensor::DType;
use gptq_calibration::{Calibration, Manifest, TextTokenizer};
use gptq_format::StagedDir;
use gptq_kernels::{Device, DeviceError, Drift, Engine, Hessian, Request, SolveError, Work};
use gptq_model::{Block, Flow, HostBlock, Model, ModelError, Stage};
use gptq_solver::SolverError;

use crate::branch_writer::BranchWriter;
use crate::memory::{chunk_windows, resident_chunks};
use crate::profile::{Clock, Phase, Profile};
use crate::stream::{Dense, Grams, Stream};
use crate::write_behind::WriteBehind;
use crate::{BranchReport, Clamped, LinearReport, PipelineError, Plan, Propagation, hidden_range};

/// How to run a plan; nothing here changes what comes out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunOptions {
    /// Wait for the device after each piece of work, so that the profile tells them apart.
    pub profile: bool,
    /// Device memory to keep within, in bytes; without it, what is free.
    pub device_memory: Option<u64>,
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// In the plan's order.
    pub reports: Vec<BranchReport>,
    /// Where the time went.
    pub profile: Profile,
}

/// What happens, as it happens.
#[derive(Debug)]
pub enum Event<'a> {
    /// Windows are drawn and the model is open; the blocks come next.
    Started {
        /// Tokens to calibrate on.
        tokens: usize,
        /// Linears each branch will quantise.
        linears: &'a [usize],
    },
    /// A linear of branch `branch` (an index into the plan) is done.
    Linear {
        /// Index into the plan's branches.
        branch: usize,
        /// Its numbers.
        report: &'a LinearReport,
    },
    /// A branch directory is in place.
    Finished {
        /// Index into the plan's branches.
        branch: usize,
        /// Its report.
        report: &'a BranchReport,
    },
}

/// Carries the plan out on `device`: one load, one tokenisation, one pass over the blocks, every
/// branch written.
///
/// # Errors
/// Whatever is wrong with the inputs is found before any block is run where it can be; an error
/// leaves no unfinished branch directory behind.
pub fn quantise(
    plan: &Plan,
    device: Device,
    options: RunOptions,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, PipelineError> {
    let clock = Clock::new(options.profile);
    let device = device.resolve()?;
    let mut budget = options.device_memory;
    let work = Quantise {
        plan,
        device,
        clock,
        budget: &mut budget,
        frugal: options.device_memory.is_some(),
        on_event,
    };
    match device.run(work) {
        Ok(outcome) => outcome,
        Err(source @ DeviceError::OutOfMemory { .. }) => Err(match budget {
            Some(budget) => PipelineError::OutOfDeviceMemory { source, budget },
            None => source.into(),
        }),
        Err(source) => Err(source.into()),
    }
}

struct Quantise<'a> {
    plan: &'a Plan,
    device: Device,
    clock: Clock,
    /// Device memory in bytes; filled in with what is free.
    budget: &'a mut Option<u64>,
    frugal: bool,
    on_event: &'a mut dyn FnMut(Event<'_>),
}

impl Work for Quantise<'_> {
    type Output = Result<Outcome, PipelineError>;

    fn run<B: Engine>(self, device: B::Device) -> Self::Output {
        let plan = self.plan;
        for branch in &plan.branches {
            StagedDir::check(&plan.branch_dir(branch))?;
        }
        *self.budget = self.budget.or_else(|| B::free_memory(&device));
        let resident = match *self.budget {
            Some(budget) => resident_chunks::<B>(plan, budget)?,
            None => usize::MAX,
        };
        let tokenizer = TextTokenizer::load(&plan.model_dir)?;
        let calibration = Calibration::draw(&plan.calibration, &tokenizer)?;
        let model = Model::<B>::open(&plan.model_dir, &device)?;
        scope(|scope| {
            let blocks = read_ahead(scope, &model);
            let flows = model.embed(
                &calibration.windows,
                chunk_windows::<B>(plan.calibration.seq_len),
                DType::F16,
            )?;
            let branches = plan.branches.iter();
            let writers = branches
                .map(|branch| BranchWriter::create(plan, branch))
                .collect::<Result<_, _>>()?;
            let mut run = Run {
                plan,
                model: &model,
                writer: WriteBehind::spawn(scope, writers, model.checkpoint()),
                outputs: plan.branches.iter().map(|_| Output::default()).collect(),
                clock: self.clock,
                frugal: self.frugal,
                on_event: self.on_event,
            };
            run.clock.add_start();
            run.announce();
            let clamp = plan.numerics.clamp_overflow;
            let dense = plan
                .asymmetric()
                .then(|| Dense::new(&flows, resident, clamp));
            let streams = run.streams(flows, resident);
            run.blocks(streams, dense, &blocks)?;
            run.finish(&calibration.manifest, &self.device.to_string())
        })
    }
}

/// Says which hidden states a Gram matrix that is not finite came from, if it was the ones that are kept.
fn explained<B: Engine>(
    error: PipelineError,
    stream: Option<&Stream<B>>,
    device: &B::Device,
) -> PipelineError {
    match error {
        PipelineError::Solver {
            branch,
            modules,
            source,
        } if matches!(
            *source,
            SolveError::Solver(SolverError::NonFiniteGram { .. })
        ) =>
        {
            match stream.and_then(|stream| stream.not_finite(device)) {
                Some(source) => PipelineError::HiddenStates {
                    branch,
                    modules,
                    source,
                },
                None => PipelineError::Solver {
                    branch,
                    modules,
                    source,
                },
            }
        }
        error => error,
    }
}

/// Reads blocks on a thread of their own, one ahead of the run.
fn read_ahead<'scope, 'env, B: Engine>(
    scope: &'scope Scope<'scope, 'env>,
    model: &'env Model<B>,
) -> Receiver<Result<HostBlock, ModelError>> {
    let (sender, receiver) = sync_channel(0);
    scope.spawn(move || {
        for layer in 0..model.config().layers {
            // A run that has ended takes no more.
            if sender.send(model.read_block(layer)).is_err() {
                break;
            }
        }
    });
    receiver
}

/// A block that the branches are in, as loaded.
struct Entered<'a, B: Engine> {
    layer: usize,
    dense: Option<&'a Dense<B>>,
}

/// One branch as it grows.
#[derive(Default)]
struct Output {
    linears: Vec<LinearReport>,
    clamped: Vec<Clamped>,
    seconds: f64,
}

struct Run<'a, 'scope, B: Engine> {
    plan: &'a Plan,
    model: &'a Model<B>,
    writer: WriteBehind<'scope>,
    outputs: Vec<Output>,
    clock: Clock,
    /// Whether device memory is to be given back as soon as it is unused: CubeCL's pools keep what was
    /// once needed, a pool for each range of sizes.
    frugal: bool,
    on_event: &'a mut dyn FnMut(Event<'_>),
}

impl<B: Engine> Run<'_, '_, B> {
    fn announce(&mut self) {
        let linears: Vec<usize> = self
            .plan
            .branches
            .iter()
            .map(|b| b.quantised_modules(&self.plan.config).len())
            .collect();
        (self.on_event)(Event::Started {
            tokens: self.plan.tokens(),
            linears: &linears,
        });
    }

    /// Branches that solve a block's stages in different groups cannot share a stream.
    fn streams(&self, flows: Vec<Flow<B>>, resident: usize) -> Vec<Stream<B>> {
        [true, false]
            .into_iter()
            .map(|sequential| {
                let branches = self.plan.branches.iter().enumerate();
                branches
                    .filter(|(_, b)| b.true_sequential == sequential)
                    .map(|(i, _)| i)
                    .collect::<Vec<_>>()
            })
            .filter(|branches| !branches.is_empty())
            .map(|branches| {
                let clamp = self.plan.numerics.clamp_overflow;
                Stream::new(flows.clone(), branches, resident, clamp)
            })
            .collect()
    }

    fn blocks(
        &mut self,
        mut streams: Vec<Stream<B>>,
        mut dense: Option<Dense<B>>,
        blocks: &Receiver<Result<HostBlock, ModelError>>,
    ) -> Result<(), PipelineError> {
        let model = self.model;
        for layer in 0..self.plan.config.layers {
            let block = self
                .clock
                .measure::<B, _>(Phase::Read, model.device(), || {
                    let block = blocks
                        .recv()
                        .expect("the reader ends with an error or the last block");
                    block.map(|block| model.upload(block))
                })?;
            if let Some(dense) = &mut dense {
                dense.enter(&block, model.device(), &mut self.clock);
            }
            let entered = Entered {
                layer,
                dense: dense.as_ref(),
            };
            let mut next = Vec::with_capacity(self.plan.branches.len());
            for stream in streams {
                let sequential = self.plan.branches[stream.branches[0]].true_sequential;
                let groups: Vec<&[Stage]> = match sequential {
                    true => Stage::ALL.chunks(1).collect(),
                    false => vec![&Stage::ALL],
                };
                self.stages(&entered, stream, &block, &groups, &mut next)?;
            }
            streams = next;
        }
        Ok(())
    }

    /// Solves the first of `groups` for every branch of `stream`, moves on with the quantised
    /// weights, and goes on with the rest; a branch at a time, once they differ. Streams at the
    /// block's end are pushed to `done`.
    fn stages(
        &mut self,
        entered: &Entered<'_, B>,
        mut stream: Stream<B>,
        block: &Block<B>,
        groups: &[&[Stage]],
        done: &mut Vec<Stream<B>>,
    ) -> Result<(), PipelineError> {
        let Some((&group, rest)) = groups.split_first() else {
            done.push(stream);
            return Ok(());
        };
        let started = Instant::now();
        let device = self.model.device();
        let asymmetric = |&branch: &usize| self.plan.branches[branch].method.asymmetric > 0.0;
        let dense = entered
            .dense
            .filter(|_| stream.branches.iter().any(asymmetric));
        let grams = stream.grams(block, group, dense, device, &mut self.clock);
        let branches = std::mem::take(&mut stream.branches);
        let shared = started.elapsed().as_secs_f64() / branches.len() as f64;
        let mut parent = Some(stream);
        for (i, &branch) in branches.iter().enumerate() {
            let started = Instant::now();
            let mut quantised = block.clone();
            for (&stage, grams) in group.iter().zip(&grams) {
                self.solve(entered.layer, branch, stage, grams.clone(), &mut quantised)
                    .map_err(|error| explained(error, parent.as_ref(), self.model.device()))?;
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
            let (own, clamped) = own.advance(&quantised, group, device, &mut self.clock);
            self.note_clamped(entered.layer, group, &[branch], clamped);
            if self.frugal {
                B::release_memory(device);
            }
            self.outputs[branch].seconds += shared + started.elapsed().as_secs_f64();
            self.stages(entered, own, &quantised, rest, done)?;
        }
        if let Some(mut stream) = parent {
            stream.branches = branches;
            let (stream, clamped) = stream.advance(block, group, device, &mut self.clock);
            self.note_clamped(entered.layer, group, &stream.branches, clamped);
            self.stages(entered, stream, block, rest, done)?;
        }
        Ok(())
    }

    fn note_clamped(&mut self, layer: usize, group: &[Stage], branches: &[usize], values: usize) {
        if values > 0 {
            let after = hidden_range::after(group);
            for &branch in branches {
                self.outputs[branch].clamped.push(Clamped {
                    layer,
                    after: after.to_owned(),
                    values,
                });
            }
        }
    }

    /// Quantises one stage's linears for one branch: codes to its files, weights into `block`.
    fn solve(
        &mut self,
        layer: usize,
        branch: usize,
        stage: Stage,
        grams: Grams<B>,
        block: &mut Block<B>,
    ) -> Result<(), PipelineError> {
        let settings = &self.plan.branches[branch];
        let (mut projections, mut requests) = (Vec::new(), Vec::new());
        for &projection in stage.projections() {
            if let Some(own) = settings.module(&projection.module(layer)) {
                let weight = block.linear(projection).weight.dense();
                requests.push(Request {
                    weight,
                    settings: own,
                });
                projections.push((projection, own));
            }
        }
        if projections.is_empty() {
            return Ok(());
        }
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
        let modules = || {
            let modules = projections.iter().map(|(p, _)| p.module(layer));
            modules.collect::<Vec<_>>().join(", ")
        };
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
        let seconds = seconds / projections.len() as f64;
        for ((projection, own), solved) in projections.into_iter().zip(subset.solved) {
            let module = projection.module(layer);
            let started = Instant::now();
            self.writer.write(branch, module.clone(), solved.packed)?;
            let waited = started.elapsed().as_secs_f64();
            self.clock.add(Phase::Write, waited);
            block.set_weight(projection, solved.weight);
            let (n_in, n_out) = projection.shape(&self.plan.config);
            let report = LinearReport {
                layer,
                name: module,
                shape: [n_out, n_in],
                bits: own.bits,
                group_size: own.group_size,
                relative_error: solved.relative_error,
                rtn_error: solved.rtn_error,
                ratio: match solved.rtn_error {
                    0.0 => 1.0,
                    rtn => solved.relative_error / rtn,
                },
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

    fn finish(mut self, manifest: &Manifest, device: &str) -> Result<Outcome, PipelineError> {
        let plan = self.plan;
        let started = Instant::now();
        let writers = self.writer.finish()?;
        let mut reports = Vec::with_capacity(plan.branches.len());
        let outputs = plan.branches.iter().zip(self.outputs).zip(writers);
        for (i, ((branch, output), writer)) in outputs.enumerate() {
            let mut report = BranchReport {
                gptq_version: env!("CARGO_PKG_VERSION").to_owned(),
                model: plan.model_name.clone(),
                branch: branch.name.clone(),
                quantize_config: branch.quantize_config(&plan.model_name),
                preset: branch.preset,
                method: branch.method,
                propagation: match plan.propagation {
                    Propagation::Quantised => "quantised".to_owned(),
                    Propagation::Dense => "dense".to_owned(),
                },
                calibration: manifest.clone(),
                device: device.to_owned(),
                bytes: 0,
                seconds: output.seconds,
                phases: self.clock.profile().phases(),
                recipe: plan.recipe.clone(),
                command: plan.command.clone(),
                clamped: output.clamped,
                perplexity: None,
                linears: output.linears,
            };
            writer.finish(plan, &mut report)?;
            (self.on_event)(Event::Finished {
                branch: i,
                report: &report,
            });
            reports.push(report);
        }
        self.clock
            .add(Phase::Write, started.elapsed().as_secs_f64());
        Ok(Outcome {
            reports,
            profile: self.clock.profile(),
        })
    }
}
