//! The driver of a run: finds which branches are still missing, and makes them in as few passes over the
//! blocks as possible.
//!
//! Longer than most: the steps of a run stand here in their order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::scope;

use gptq_calibration::{Calibration, TextTokenizer};
use gptq_export::check_tokenizer;
use gptq_format::{Checkpoint, FormatError, OutputLock, StagedDir};
use gptq_kernels::{Device, DeviceError, Engine, Work};
use gptq_model::Model;
use gptq_plan::{
    Allocation, BranchPlan, BranchReport, Fingerprint, Header, Places, Plan, RecordedRun, SHARE,
};
use gptq_ranks::Collective;

use crate::agreement::{agreed, told};
use crate::branch_writer::BranchWriter;
use crate::chunking::chunking;
use crate::disk_space;
use crate::fingerprint::Fingerprints;
use crate::finish::About;
use crate::journal::Journal;
use crate::measure::{self, Measuring};
use crate::model_files::ModelHash;
use crate::options::{RunOptions, check_stop};
use crate::peers::{MatrixPath, Peers, connected};
use crate::profile::{Clock, Profile, TimedRanks};
use crate::read_ahead::read_ahead;
use crate::resume::{Pass, Restored, WorkLeft, date_told, discard, origin};
use crate::run::Run;
use crate::scratch::Scratch;
use crate::states::{Sample, embed, of_all_ranks};
use crate::stream::Stream;
use crate::write_behind::WriteBehind;
use crate::{Event, RunError};

/// The result of a run.
#[derive(Debug)]
pub struct Outcome {
    /// Reports of the branches, in the plan's order.
    pub reports: Vec<BranchReport>,
    /// Times of the run's parts.
    pub profile: Profile,
    /// The same of the other ranks, in their order.
    pub others: Vec<Profile>,
    /// Keeps others from the output directory for as long as the branches are still worked on; held by rank 0.
    pub lock: Option<OutputLock>,
}

/// Carries the plan out on `device`, as the only rank or one of several that are given the same plan and come to this
/// call, each with a device: one load, one tokenisation, one pass over the blocks, every
/// branch written. Branches that are finished are left as they are, and a run that was stopped goes
/// on from its last finished block.
///
/// # Errors
/// Whatever is wrong with the inputs is found before any block is run where it can be. After an
/// error in a later block the output directory holds the unfinished run, to be gone on with.
pub fn quantize(
    plan: &Plan,
    device: Device,
    ranks: &dyn Collective,
    options: RunOptions<'_>,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, RunError> {
    quantize_by(MatrixPath::Devices, plan, device, ranks, options, on_event)
}

/// Does the same, with matrices on their way between ranks as `path` says.
pub(crate) fn quantize_by(
    path: MatrixPath,
    plan: &Plan,
    device: Device,
    ranks: &dyn Collective,
    options: RunOptions<'_>,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, RunError> {
    let error = match on_rank(path, plan, device, ranks, options, on_event) {
        Ok(outcome) => return Ok(outcome),
        // Of a link that was ended for another rank's sake, matrices may come to any error.
        Err(error @ (RunError::Stopped { .. } | RunError::Ranks(_))) => error,
        Err(error) => ranks.check().err().map_or(error, RunError::from),
    };
    ranks.end(error.cause());
    Err(error)
}

/// The part of [`quantize`] whose errors the other ranks are told.
fn on_rank(
    path: MatrixPath,
    plan: &Plan,
    device: Device,
    ranks: &dyn Collective,
    options: RunOptions<'_>,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, RunError> {
    let clock = Clock::new(options.profile);
    let ranks = TimedRanks {
        ranks,
        times: clock.ranks(),
    };
    let device = device.resolve()?;
    let mut budget = options.device_memory;
    let work = Quantize {
        plan,
        path,
        device,
        ranks: &ranks,
        options,
        clock,
        budget: &mut budget,
        on_event,
    };
    match device.run(work) {
        Ok(outcome) => outcome,
        Err(source @ DeviceError::OutOfMemory { .. }) => Err(match budget {
            Some(budget) => RunError::OutOfDeviceMemory { source, budget },
            None => source.into(),
        }),
        Err(source) => Err(source.into()),
    }
}

struct Quantize<'a> {
    plan: &'a Plan,
    path: MatrixPath,
    device: Device,
    ranks: &'a dyn Collective,
    options: RunOptions<'a>,
    clock: Clock,
    /// Device memory in bytes; filled in with what is free.
    budget: &'a mut Option<u64>,
    on_event: &'a mut dyn FnMut(Event<'_>),
}

/// Inputs of every pass.
struct Inputs<'a, B: Engine> {
    peers: Peers<'a, B>,
    model: Model<B>,
    calibration: Calibration,
    prints: Fingerprints,
    places: Places,
}

impl Work for Quantize<'_> {
    type Output = Result<Outcome, RunError>;

    fn run<B: Engine>(self, device: B::Device) -> Self::Output {
        let (path, ranks) = (self.path, self.ranks);
        let timed = (self.clock.ranks(), self.clock.waits());
        let work = |peers: Peers<'_, B>| self.on_device(&device, peers);
        connected(&device, path, ranks, timed, work)
    }
}

impl Quantize<'_> {
    /// The part of [`quantize`] with the device found and connected.
    fn on_device<B: Engine>(
        mut self,
        device: &B::Device,
        peers: Peers<'_, B>,
    ) -> Result<Outcome, RunError> {
        let (plan, ranks) = (self.plan, self.ranks);
        let lock = match ranks.is_root() {
            true => Some(OutputLock::acquire(&plan.output)?),
            false => None,
        };
        if lock.as_ref().is_some_and(|lock| !lock.is_exclusive()) {
            (self.on_event)(Event::NotLocked { dir: &plan.output });
        }
        for branch in plan.branches.iter().filter(|_| ranks.is_root()) {
            StagedDir::check(&plan.branch_dir(branch))?;
        }
        *self.budget = self.budget.or_else(|| B::free_memory(device));
        // Where nothing says how much is free, tensors are in the host's memory.
        let shared = B::free_memory(device).is_none();
        let places = Places::new(
            plan,
            ranks.share().size,
            chunking::<B>(),
            *self.budget,
            self.options.host_memory,
            shared,
        )?;
        check_tokenizer(plan)?;
        let model = Model::<B>::open(&plan.model_dir, device)?.taken_in(plan.half);
        let tokenizer = TextTokenizer::load(&plan.model_dir)?;
        let mut settings = plan.calibration.clone();
        if settings.date.is_none() && !self.options.restart && ranks.is_root() {
            settings.date = date_told(plan)?;
        }
        if ranks.share().size > 1 {
            // A template that asks for the date is to be told one.
            let date = settings
                .date
                .take()
                .or_else(|| Some(gptq_calibration::now()));
            settings.date = told(ranks, date)?;
        }
        let calibration = Calibration::draw(&settings, &tokenizer)?;
        (self.on_event)(Event::Calibrated {
            warnings: &calibration.warnings(),
        });
        let (checkpoint, card) = (model.checkpoint(), B::device_name(device));
        let prints = Fingerprints::new(plan, &calibration, checkpoint, self.device, card)?;
        prints.compare(ranks)?;
        let places = agreed(places, ranks)?;
        let mut model_hash = ModelHash::new(checkpoint, model.config(), plan.half);
        let mut found = match ranks.is_root() {
            true => WorkLeft::look(plan, checkpoint, &prints, &mut model_hash, &self.options)?,
            false => WorkLeft::none(plan),
        };
        if ranks.is_root() && !found.passes.is_empty() {
            model_hash.begin();
        }
        let passes: Vec<&[usize]> = found.passes.iter().map(|pass| &pass.branches[..]).collect();
        let passes: Vec<Vec<usize>> = told(ranks, &passes)?;
        if !ranks.is_root() {
            found.passes = passes.into_iter().map(|it| Pass::new(it, None)).collect();
        }
        let unfinished = found.passes.iter().any(|pass| pass.recorded.is_some());
        let inputs = Inputs {
            peers,
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
                (self.on_event)(Event::AlreadyFinished { branch, report });
            }
        }
        if !unfinished && ranks.is_root() {
            discard(plan)?;
        }
        let missing: Vec<usize> = (found.passes.iter())
            .flat_map(|pass| pass.branches.iter().copied())
            .collect();
        if !missing.is_empty() && ranks.is_root() {
            let (scratch, states) = (self.options.scratch, inputs.places.disk_bytes);
            disk_space::check(&plan.only(&missing), scratch, states)?;
        }
        for pass in found.passes {
            let reports = self.pass(&inputs, &mut model_hash, &pass.branches, pass.recorded)?;
            for (branch, report) in pass.branches.into_iter().zip(reports) {
                found.finished[branch] = Some(report);
            }
        }
        let profiles = ranks.gather(self.clock.profile().to_bytes())?;
        let others = profiles
            .iter()
            .skip(1)
            .map(|it| Profile::of_bytes(it))
            .collect();
        ranks.leave()?;
        Ok(Outcome {
            reports: found.finished.into_iter().flatten().collect(),
            profile: self.clock.profile(),
            others,
            lock,
        })
    }

    /// Makes these branches in one pass over the blocks.
    fn pass<B: Engine>(
        &mut self,
        inputs: &Inputs<'_, B>,
        model_hash: &mut ModelHash,
        branches: &[usize],
        recorded: Option<RecordedRun>,
    ) -> Result<Vec<BranchReport>, RunError> {
        let mut plan = self.plan.only(branches);
        let settled = self.settle(inputs, model_hash, &plan, branches, recorded.as_ref());
        let done = settled.and_then(|settled| {
            plan.branches = settled;
            self.blocks(inputs, model_hash, &plan, branches, recorded)
        });
        let plan = &plan;
        if !self.ranks.is_root() {
            return done;
        }
        if done.is_ok() {
            Journal::remove(&plan.output)?;
            return done;
        }
        // What ended the run is what is told, whatever else goes wrong now.
        let finished = match RecordedRun::read(&plan.output) {
            Ok(found) => found.map_or(0, |found| found.blocks.len()),
            Err(_) => return done,
        };
        if finished == 0 {
            let _ = discard(plan);
        }
        match done {
            Err(RunError::Stopped { .. }) => Err(RunError::Stopped {
                done: finished,
                layers: plan.config.layers,
            }),
            other => other,
        }
    }

    /// The branches of `plan` with their size budgets spent: as `recorded` says, or else by probing.
    fn settle<B: Engine>(
        &mut self,
        inputs: &Inputs<'_, B>,
        model_hash: &mut ModelHash,
        plan: &Plan,
        branches: &[usize],
        recorded: Option<&RecordedRun>,
    ) -> Result<Vec<BranchPlan>, RunError> {
        if !plan.branches.iter().any(BranchPlan::is_open) {
            return Ok(plan.branches.clone());
        }
        let recorded = recorded.map(|recorded| &recorded.header.allocations);
        let recorded: Option<BTreeMap<String, Allocation>> = told(self.ranks, recorded)?;
        let settled = match &recorded {
            Some(allocations) => measure::recorded(plan, allocations)?,
            None => {
                // Before there is work to lose.
                if self.ranks.is_root() {
                    disk_space::check(plan, self.options.scratch, inputs.places.disk_bytes)?;
                }
                let windows = measure::windows(&inputs.calibration.windows);
                let probes = measure::probes(plan, windows.len());
                let host = self.options.host_memory;
                let shared = B::free_memory(inputs.model.device()).is_none();
                let size = self.ranks.share().size;
                let places =
                    Places::new(&probes, size, chunking::<B>(), *self.budget, host, shared)?;
                let places = agreed(places, self.ranks)?;
                let scratch = self.scratch(plan, &places)?;
                let (ranks, stop, layers) = (self.ranks, self.options.stop, plan.config.layers);
                let measuring = Measuring {
                    model: &inputs.model,
                    peers: inputs.peers,
                    clock: &mut self.clock,
                    frugal: self.options.device_memory.is_some(),
                    check: &mut || {
                        check_stop(stop, layers)?;
                        ranks.check()?;
                        model_hash.check()
                    },
                    on_event: self.on_event,
                };
                measuring.spend(plan, &probes, &windows, &places, scratch.as_ref())?
            }
        };
        for (branch, &index) in settled.iter().zip(branches) {
            if let Some(allocation) = &branch.allocation {
                (self.on_event)(Event::Allocated {
                    branch: index,
                    allocation,
                });
            }
        }
        Ok(settled)
    }

    /// Creates the scratch file for hidden states that do not fit in memory, if there are any.
    fn scratch(&self, plan: &Plan, places: &Places) -> Result<Option<Arc<Scratch>>, FormatError> {
        // Other ranks may have a host that cannot write there.
        let elsewhere = std::env::temp_dir();
        let usual = if self.ranks.is_root() {
            &plan.output
        } else {
            &elsewhere
        };
        match places.disk_bytes {
            0 => Ok(None),
            _ => Scratch::create(self.options.scratch.unwrap_or(usual)).map(Some),
        }
    }

    fn blocks<B: Engine>(
        &mut self,
        inputs: &Inputs<'_, B>,
        model_hash: &mut ModelHash,
        plan: &Plan,
        branches: &[usize],
        recorded: Option<RecordedRun>,
    ) -> Result<Vec<BranchReport>, RunError> {
        let prints: Vec<_> = branches
            .iter()
            .map(|&i| &inputs.prints.branches[i])
            .collect();
        let names: Vec<String> = plan.branches.iter().map(|b| b.name.clone()).collect();
        let scratch = self.scratch(plan, &inputs.places)?;
        let (written, restored) = match self.ranks.is_root() {
            true => {
                let (written, restored) = self.begin_writing(inputs, plan, &prints, recorded)?;
                let _: [usize; 2] = told(self.ranks, [restored.layers, restored.first()])?;
                (Some(written), restored)
            }
            false => (None, Restored::of_rank_0(plan, told(self.ranks, [0; 2])?)),
        };
        let partials = match (&written, restored.layers) {
            (None, _) | (_, 0) => Vec::new(),
            (Some((writers, _)), _) => {
                (writers.iter().map(|writer| Checkpoint::open(writer.path())))
                    .collect::<Result<_, _>>()?
            }
        };
        let (model, ranks, on_event) = (&inputs.model, self.ranks, &mut *self.on_event);
        let windows = &inputs.calibration.windows;
        let share = plan.share();
        let sample = |all: &Stream<B>| -> Result<Stream<B>, RunError> {
            if ranks.share().size > 1 {
                return of_all_ranks(model, windows, share.tokens, all);
            }
            Ok(all.sample(SHARE, share.tokens, model.device())?)
        };
        let sample: Option<Sample<'_, B>> = match ranks.is_root() {
            true => Some(&sample),
            false => None,
        };
        scope(|scope| {
            let blocks = read_ahead(scope, model, restored.first());
            let embedded = embed(model, windows, plan.calibration.seq_len, ranks)?;
            let checkpoint = model.checkpoint();
            let writer = written.map(|(writers, journal)| {
                WriteBehind::spawn(scope, writers, checkpoint, journal, names)
            });
            let run = Run {
                plan,
                model,
                peers: inputs.peers,
                model_hash,
                writer,
                restored,
                partials,
                clock: &mut self.clock,
                frugal: self.options.device_memory.is_some(),
                stop: self.options.stop,
                save_every: self.options.save_every,
                on_event: &mut |event| on_event(event.of(branches)),
            };
            let about = About {
                manifest: &inputs.calibration.manifest,
                device: self.device.to_string(),
                prints,
            };
            run.carry_out(
                embedded,
                sample,
                &inputs.places,
                scratch.as_ref(),
                &blocks,
                about,
            )
        })
    }

    /// Begins the branches' files and the journal, or goes on with those of an interrupted run.
    fn begin_writing<B: Engine>(
        &mut self,
        inputs: &Inputs<'_, B>,
        plan: &Plan,
        prints: &[&Fingerprint],
        recorded: Option<RecordedRun>,
    ) -> Result<((Vec<BranchWriter>, Journal), Restored), RunError> {
        let Some(recorded) = recorded else {
            let writers = plan.branches.iter().map(|b| BranchWriter::create(plan, b));
            let writers = writers.collect::<Result<Vec<_>, FormatError>>()?;
            let names = plan.branches.iter().map(|b| b.name.clone());
            let branches = names.zip(prints.iter().map(|&print| print.clone()));
            let spent = plan.branches.iter();
            let spent = spent.filter_map(|b| Some((b.name.clone(), b.allocation.clone()?)));
            let header = Header::new(
                origin(plan)?,
                [inputs.prints.run.clone(), inputs.prints.files.clone()],
                inputs.prints.embedding.clone(),
                branches.collect(),
                spent.collect(),
            );
            let journal = Journal::create(&plan.output, &header)?;
            return Ok(((writers, journal), Restored::none(plan)));
        };
        let journal = Journal::reopen(&plan.output, &recorded)?;
        let restored = Restored::new(plan, recorded)?;
        let writers = (plan.branches.iter().zip(&restored.branches))
            .map(|(branch, restored)| {
                BranchWriter::reopen(plan, branch, &restored.progress.linears)
            })
            .collect::<Result<Vec<_>, FormatError>>()?;
        (self.on_event)(Event::Resumed {
            layers: restored.layers,
            kept: restored.first(),
        });
        Ok(((writers, journal), restored))
    }
}
