//! The whole job: what is asked for, less what is there already, in as few passes over the blocks
//! as that takes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

use gptq_calibration::{Calibration, TextTokenizer};
use gptq_format::{Checkpoint, FormatError, OutputLock, StagedDir};
use gptq_kernels::{Device, DeviceError, Engine, Work, dtype};
use gptq_model::Model;

use crate::branch_writer::BranchWriter;
use crate::disk_space;
use crate::fingerprint::Fingerprints;
use crate::journal::{Header, Journal, Origin, Recorded};
use crate::memory::{Places, chunk_windows};
use crate::model_files::ModelHash;
use crate::profile::{Clock, Profile};
use crate::read_ahead::read_ahead;
use crate::resume::{Found, Restored, date_told, discard};
use crate::run::{About, Run};
use crate::scratch::Scratch;
use crate::write_behind::WriteBehind;
use crate::{Allocation, BlockReport, BranchReport, LinearReport, PipelineError, Plan};

/// How to run a plan; nothing here changes what comes out.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions<'a> {
    /// Wait for the device after each piece of work, so that the profile tells them apart.
    pub profile: bool,
    /// Device memory to keep within, in bytes; without it, what is free.
    pub device_memory: Option<u64>,
    /// Host memory to keep within, in bytes; without it, none is counted.
    pub host_memory: Option<u64>,
    /// Where hidden states go that have no place in memory; without it, the output directory.
    pub scratch: Option<&'a Path>,
    /// Keep the hidden states on the disk whenever the last kept are this old, so that a run that is
    /// stopped loses no more than that.
    pub keep_every: Duration,
    /// Make everything again, whatever is there.
    pub restart: bool,
    /// Once it is true, the run ends as soon as it can be gone on with.
    pub stop: &'a AtomicBool,
}

/// What came of a run.
#[derive(Debug)]
pub struct Outcome {
    /// In the plan's order.
    pub reports: Vec<BranchReport>,
    /// Where the time went.
    pub profile: Profile,
    /// Keeps others from the output directory for as long as the branches are still worked on.
    pub lock: OutputLock,
}

/// What happens, as it happens. A branch is an index into the plan.
#[derive(Debug)]
pub enum Event<'a> {
    /// The output directory is on a file system without locks: nothing keeps a second run away.
    NotLocked {
        /// The directory.
        dir: &'a Path,
    },
    /// Calibration windows are drawn.
    Calibrated {
        /// What should be known of the text, in a line each.
        warnings: &'a [String],
    },
    /// Windows are drawn and the model is open; the blocks come next.
    Started {
        /// Tokens to calibrate on.
        tokens: usize,
        /// Linears each branch will quantize.
        linears: &'a [usize],
    },
    /// A branch was finished by an earlier run.
    Kept {
        /// Which.
        branch: usize,
        /// Its report.
        report: &'a BranchReport,
    },
    /// What the choices of budgets cost in the first blocks is measured.
    Measured {
        /// How many blocks.
        layers: usize,
    },
    /// A budget is spent, now or by an earlier run.
    Allocated {
        /// Of which branch.
        branch: usize,
        /// How.
        allocation: &'a Allocation,
    },
    /// An earlier run finished some blocks of the branches that come next; they go on from there.
    Resumed {
        /// How many.
        layers: usize,
        /// How many of them need not be gone over again: the hidden states after them were kept.
        kept: usize,
    },
    /// Hidden states are on the disk.
    StatesKept {
        /// Blocks they have been through.
        layers: usize,
    },
    /// Hidden states were to be kept, but are not on the disk.
    StatesNotKept {
        /// Blocks they have been through.
        layers: usize,
        /// No room, a disk that fails, or a run that is to stop.
        why: &'a str,
    },
    /// A linear is done, or was and is taken over.
    Linear {
        /// Of which branch.
        branch: usize,
        /// Its numbers.
        report: &'a LinearReport,
    },
    /// A branch's output after a block was compared with the dense model's.
    Block {
        /// Of which branch.
        branch: usize,
        /// Its numbers.
        report: &'a BlockReport,
    },
    /// A branch directory is in place.
    Finished {
        /// Which.
        branch: usize,
        /// Its report.
        report: &'a BranchReport,
    },
}

/// Carries the plan out on `device`: one load, one tokenisation, one pass over the blocks, every
/// branch written. Branches that are finished are left as they are, and a run that was stopped goes
/// on from its last finished block.
///
/// # Errors
/// Whatever is wrong with the inputs is found before any block is run where it can be. After an
/// error in a later block the output directory holds the unfinished run, to be gone on with.
pub fn quantize(
    plan: &Plan,
    device: Device,
    options: RunOptions<'_>,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, PipelineError> {
    let clock = Clock::new(options.profile);
    let device = device.resolve()?;
    let mut budget = options.device_memory;
    let work = Quantize {
        plan,
        device,
        options,
        clock,
        budget: &mut budget,
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

pub(crate) struct Quantize<'a> {
    plan: &'a Plan,
    device: Device,
    pub(crate) options: RunOptions<'a>,
    pub(crate) clock: Clock,
    /// Device memory in bytes; filled in with what is free.
    pub(crate) budget: &'a mut Option<u64>,
    pub(crate) on_event: &'a mut dyn FnMut(Event<'_>),
}

/// What every pass takes.
pub(crate) struct Inputs<B: Engine> {
    pub(crate) model: Model<B>,
    pub(crate) calibration: Calibration,
    prints: Fingerprints,
    pub(crate) places: Places,
}

impl Work for Quantize<'_> {
    type Output = Result<Outcome, PipelineError>;

    fn run<B: Engine>(mut self, device: B::Device) -> Self::Output {
        let plan = self.plan;
        let lock = OutputLock::acquire(&plan.output)?;
        if !lock.is_exclusive() {
            (self.on_event)(Event::NotLocked { dir: &plan.output });
        }
        for branch in &plan.branches {
            StagedDir::check(&plan.branch_dir(branch))?;
        }
        *self.budget = self.budget.or_else(|| B::free_memory(&device));
        // Where nothing says how much is free, tensors are in the host's memory.
        let shared = B::free_memory(&device).is_none();
        let places = Places::new::<B>(plan, *self.budget, self.options.host_memory, shared)?;
        let model = Model::<B>::open(&plan.model_dir, &device)?.taken_in(plan.half);
        let tokenizer = TextTokenizer::load(&plan.model_dir)?;
        let mut settings = plan.calibration.clone();
        if settings.date.is_none() && !self.options.restart {
            settings.date = date_told(plan)?;
        }
        let calibration = Calibration::draw(&settings, &tokenizer)?;
        (self.on_event)(Event::Calibrated {
            warnings: &calibration.warnings(),
        });
        let (checkpoint, card) = (model.checkpoint(), B::card(&device));
        let prints = Fingerprints::new(plan, &calibration, checkpoint, self.device, card)?;
        let mut model_hash = ModelHash::new(checkpoint, model.config(), plan.half);
        let mut found = Found::look(plan, checkpoint, &prints, &mut model_hash, &self.options)?;
        if !found.passes.is_empty() {
            model_hash.begin();
        }
        let unfinished = found.passes.iter().any(|pass| pass.recorded.is_some());
        let inputs = Inputs {
            model,
            calibration,
            prints,
            places,
        };
        let linears: Vec<usize> = (plan.branches.iter())
            .map(|b| b.planned_linears(&plan.config).len())
            .collect();
        (self.on_event)(Event::Started {
            tokens: plan.tokens(),
            linears: &linears,
        });
        for (branch, report) in found.finished.iter().enumerate() {
            if let Some(report) = report {
                StagedDir::tidy(&plan.branch_dir(&plan.branches[branch]))?;
                (self.on_event)(Event::Kept { branch, report });
            }
        }
        if !unfinished {
            discard(plan)?;
        }
        let missing: Vec<usize> = (found.passes.iter())
            .flat_map(|pass| pass.branches.iter().copied())
            .collect();
        if !missing.is_empty() {
            let (scratch, states) = (self.options.scratch, inputs.places.disk_bytes);
            disk_space::check(&plan.only(&missing), scratch, states)?;
        }
        for pass in found.passes {
            let reports = self.pass(&inputs, &mut model_hash, &pass.branches, pass.recorded)?;
            for (branch, report) in pass.branches.into_iter().zip(reports) {
                found.finished[branch] = Some(report);
            }
        }
        Ok(Outcome {
            reports: found.finished.into_iter().flatten().collect(),
            profile: self.clock.profile(),
            lock,
        })
    }
}

impl Quantize<'_> {
    /// Makes these branches in one pass over the blocks.
    fn pass<B: Engine>(
        &mut self,
        inputs: &Inputs<B>,
        model_hash: &mut ModelHash,
        branches: &[usize],
        recorded: Option<Recorded>,
    ) -> Result<Vec<BranchReport>, PipelineError> {
        let mut plan = self.plan.only(branches);
        let settled = self.settle(inputs, model_hash, &mut plan, branches, recorded.as_ref());
        let done = match settled {
            Ok(()) => self.blocks(inputs, model_hash, &plan, branches, recorded),
            Err(error) => Err(error),
        };
        let plan = &plan;
        if done.is_ok() {
            Journal::remove(&plan.output)?;
            return done;
        }
        // What ended the run is what is told, whatever else goes wrong now.
        let finished = match Journal::read(&plan.output) {
            Ok(found) => found.map_or(0, |found| found.blocks.len()),
            Err(_) => return done,
        };
        if finished == 0 {
            let _ = discard(plan);
        }
        match done {
            Err(PipelineError::Stopped { layers, .. }) => Err(PipelineError::Stopped {
                done: finished,
                layers,
            }),
            other => other,
        }
    }

    /// Where the hidden states go that have no place in memory, if there are any.
    pub(crate) fn scratch(
        &self,
        plan: &Plan,
        places: &Places,
    ) -> Result<Option<Arc<Scratch>>, FormatError> {
        match places.disk_bytes {
            0 => Ok(None),
            _ => Scratch::create(self.options.scratch.unwrap_or(&plan.output)).map(Some),
        }
    }

    fn blocks<B: Engine>(
        &mut self,
        inputs: &Inputs<B>,
        model_hash: &mut ModelHash,
        plan: &Plan,
        branches: &[usize],
        recorded: Option<Recorded>,
    ) -> Result<Vec<BranchReport>, PipelineError> {
        let prints: Vec<_> = branches
            .iter()
            .map(|&i| &inputs.prints.branches[i])
            .collect();
        let names: Vec<String> = plan.branches.iter().map(|b| b.name.clone()).collect();
        let scratch = self.scratch(plan, &inputs.places)?;
        let (writers, journal, restored) = match recorded {
            None => {
                let writers = plan.branches.iter().map(|b| BranchWriter::create(plan, b));
                let writers = writers.collect::<Result<Vec<_>, FormatError>>()?;
                let prints = prints.iter().map(|&print| print.clone());
                let branches: BTreeMap<_, _> = names.iter().cloned().zip(prints).collect();
                let spent = plan.branches.iter();
                let spent = spent.filter_map(|b| Some((b.name.clone(), b.allocation.clone()?)));
                let header = Header::new(origin(plan)?, &inputs.prints, branches, spent.collect());
                let journal = Journal::create(&plan.output, &header)?;
                (writers, journal, Restored::none(plan))
            }
            Some(recorded) => {
                let journal = Journal::reopen(&plan.output, &recorded)?;
                let restored = Restored::new(plan, recorded)?;
                let writers = (plan.branches.iter().zip(&restored.branches))
                    .map(|(branch, restored)| BranchWriter::reopen(plan, branch, &restored.linears))
                    .collect::<Result<Vec<_>, FormatError>>()?;
                (self.on_event)(Event::Resumed {
                    layers: restored.layers,
                    kept: restored.first(),
                });
                (writers, journal, restored)
            }
        };
        let partials = match restored.layers {
            0 => Vec::new(),
            _ => (writers.iter().map(|writer| Checkpoint::open(writer.path())))
                .collect::<Result<_, _>>()?,
        };
        let (model, on_event) = (&inputs.model, &mut *self.on_event);
        scope(|scope| {
            let blocks = read_ahead(scope, model, restored.first());
            let flows = model.flows(
                &inputs.calibration.windows,
                chunk_windows::<B>(plan.calibration.seq_len),
                dtype(B::kept(plan.half)),
            )?;
            let checkpoint = model.checkpoint();
            let run = Run {
                plan,
                model,
                model_hash,
                writer: Some(WriteBehind::spawn(
                    scope, writers, checkpoint, journal, names,
                )),
                outputs: restored.outputs(),
                restored,
                partials,
                clock: &mut self.clock,
                frugal: self.options.device_memory.is_some(),
                stop: self.options.stop,
                keep_every: self.options.keep_every,
                last_kept: Instant::now(),
                on_event: &mut |event| on_event(event.of(branches)),
            };
            let about = About {
                manifest: &inputs.calibration.manifest,
                device: self.device.to_string(),
                prints,
            };
            run.carry_out(flows, &inputs.places, scratch.as_ref(), &blocks, about)
        })
    }
}

impl<'a> Event<'a> {
    /// The same, its branch an index into `branches`.
    fn of(self, branches: &[usize]) -> Event<'a> {
        match self {
            Event::Linear { branch, report } => Event::Linear {
                branch: branches[branch],
                report,
            },
            Event::Block { branch, report } => Event::Block {
                branch: branches[branch],
                report,
            },
            Event::Finished { branch, report } => Event::Finished {
                branch: branches[branch],
                report,
            },
            Event::Allocated { branch, allocation } => Event::Allocated {
                branch: branches[branch],
                allocation,
            },
            other => other,
        }
    }
}

fn origin(plan: &Plan) -> Result<Origin, FormatError> {
    let here = Path::new(".");
    Ok(Origin {
        path: plan.recipe_path.clone(),
        recipe: plan.recipe.clone(),
        overrides: plan.overrides.clone(),
        directory: here.canonicalize().map_err(FormatError::io(here))?,
    })
}

/// An error once `stop` is true.
pub(crate) fn check_stop(stop: &AtomicBool, layers: usize) -> Result<(), PipelineError> {
    match stop.load(Ordering::Relaxed) {
        false => Ok(()),
        true => Err(PipelineError::Stopped { done: 0, layers }),
    }
}
