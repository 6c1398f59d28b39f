//! The ranks of a run: one, threads of this process (`--ranks`, `--device cuda:0,1`), or processes that a launcher starts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Error, Result, bail};
use gptq_kernels::{Device, Devices};
use gptq_plan::Plan;
use gptq_ranks::{
    Cause, Collective, JoinOptions, OneRank, Processes, RankLaunch, RankShare, check_size, host,
    join,
};
use gptq_run::{Event, Outcome, RunError, RunOptions, quantize, quantize_on_threads};

use crate::cli::RunArgs;
use crate::signals::Signals;
use crate::{environment, log, terminal};

/// Time that a rank has to end by itself once another has ended the run.
const GRACE: Duration = Duration::from_secs(10);
/// Time between looks.
const LOOK: Duration = Duration::from_millis(200);

/// The ranks of a run, as this process takes part.
pub(crate) enum Ranks {
    OneRank(Device),
    /// All of them, as threads, each with its device.
    Threads(Vec<Device>),
    /// One of them, with its device.
    Process(Process, Device),
}

/// A rank that is this process.
pub(crate) struct Process {
    ranks: Arc<Processes>,
    /// True once this rank has done its part.
    over: Arc<AtomicBool>,
}

impl Ranks {
    /// Brings this process together with those that a launcher has started beside it, if there are any.
    ///
    /// # Errors
    /// Flags and variables that do not fit, and ranks that do not come together.
    pub(crate) fn start(args: &RunArgs, signals: &Signals) -> Result<Ranks> {
        let launch = RankLaunch::of(environment::text)?;
        let launch = match (args.ranks, launch) {
            (None | Some(1), None) => return Ranks::of_devices(&args.device),
            (Some(_), None) if !matches!(args.device, Devices::One(_)) => {
                bail!(
                    "--device {} has a rank on each device; leave --ranks out",
                    args.device
                )
            }
            (Some(ranks), None) => {
                let device = args.device.resolve().map_err(RunError::from)?[0];
                if device != Device::Cpu {
                    bail!(
                        "--ranks shares the work of the CPU, and the device is {}; use --device cpu, or name GPUs by --device \
                         cuda:0,1 without --ranks",
                        args.device
                    );
                }
                return Ok(Ranks::Threads(vec![device; ranks]));
            }
            (None, Some(launch)) => launch,
            (Some(_), Some(launch)) => bail!(
                "--ranks makes ranks of this process's threads, but {} starts {} processes; leave one of them out",
                launch.launcher.name(),
                launch.size
            ),
        };
        log::rank(launch.rank);
        let device = args.device.of_local_rank(launch.local_rank);
        let ranks = join(
            &launch,
            JoinOptions {
                within: args.join_timeout,
                on_stranger: &mut |line| log::warning(line),
                check: &mut || signals.status().is_some(),
            },
        )?;
        let process = Process::new(ranks);
        // The others are told of a device that is missing.
        match device {
            Ok(device) => Ok(Ranks::Process(process, device)),
            Err(error) => {
                let ranks = Ranks::Process(process, Device::Cpu);
                ranks.told(Err(RunError::from(error).into()))
            }
        }
    }

    /// Returns a rank for each of some devices.
    fn of_devices(devices: &Devices) -> Result<Ranks> {
        if let Devices::One(device) = devices {
            return Ok(Ranks::OneRank(*device));
        }
        if let Devices::Cuda(indices) = devices {
            check_size(indices.len())?;
        }
        let devices = devices.resolve().map_err(RunError::from)?;
        match devices[..] {
            [device] => Ok(Ranks::OneRank(device)),
            _ => {
                check_size(devices.len())?;
                Ok(Ranks::Threads(devices))
            }
        }
    }

    /// Returns the device of this process's first rank.
    pub(crate) fn device(&self) -> Device {
        match self {
            Ranks::OneRank(device) | Ranks::Process(_, device) => *device,
            Ranks::Threads(devices) => devices[0],
        }
    }

    /// True if this process has the output, and tells what happens.
    pub(crate) fn is_root(&self) -> bool {
        self.process().is_none_or(|it| it.is_root())
    }

    /// Number of ranks.
    pub(crate) fn size(&self) -> usize {
        match self {
            Ranks::OneRank(_) => 1,
            Ranks::Threads(devices) => devices.len(),
            Ranks::Process(process, _) => process.ranks.share().size,
        }
    }

    fn process(&self) -> Option<&dyn Collective> {
        match self {
            Ranks::Process(process, _) => Some(&*process.ranks),
            _ => None,
        }
    }

    /// Does `work` on rank 0 first, and then on the others: what one downloads, those on its host find.
    pub(crate) fn root_first<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(process) = self.process() else {
            return work();
        };
        if !process.is_root() {
            process.broadcast(Vec::new())?;
            return work();
        }
        let done = work()?;
        process.broadcast(Vec::new())?;
        Ok(done)
    }

    /// Carries the plan out.
    ///
    /// # Errors
    /// Those of the run.
    pub(crate) fn quantize(
        &self,
        plan: &Plan,
        options: RunOptions<'_>,
        on_event: &mut dyn FnMut(Event<'_>),
    ) -> Result<Outcome> {
        let done = match self {
            Ranks::OneRank(device) => quantize(plan, *device, &OneRank, options, on_event),
            Ranks::Threads(devices) => quantize_on_threads(plan, devices, options, on_event),
            Ranks::Process(process, device) => {
                quantize(plan, *device, &*process.ranks, options, on_event)
            }
        };
        Ok(done?)
    }
}

impl Ranks {
    /// Tells the other ranks of an error of this one, and names the rank in it.
    pub(crate) fn told<T>(&self, done: Result<T>) -> Result<T> {
        let Ranks::Process(Process { ranks, over, .. }, _) = self else {
            return done;
        };
        let done = done.map_err(|error| {
            let stopped = matches!(error.downcast_ref(), Some(RunError::Stopped { .. }));
            ranks.end(match stopped {
                true => Cause::Stopped,
                false => Cause::Failed(error.to_string()),
            });
            let RankShare { rank, .. } = ranks.share();
            match ranks.ended().filter(|ended| ended.rank != rank) {
                // Rank 0 knows how far the run came.
                Some(_) if stopped && rank == 0 => error,
                Some(ended) => Error::msg(ended.to_string()),
                None if stopped && rank > 0 => {
                    Error::msg(format!("rank {rank} on {}: stopped", host()))
                }
                None => Error::msg(format!("rank {rank} on {}: {error}", host())),
            }
        });
        over.store(true, Ordering::Relaxed);
        done
    }
}

impl Process {
    fn new(ranks: Processes) -> Self {
        let process = Process {
            ranks: Arc::new(ranks),
            over: Arc::default(),
        };
        let (ranks, over) = (process.ranks.clone(), process.over.clone());
        spawn(move || watch(&ranks, &over));
        process
    }
}

/// Ends the process some time after another rank has ended the run, whatever it is at: a product over a large block may
/// take longer. A run that ends anywhere can be resumed.
fn watch(ranks: &Processes, over: &AtomicBool) {
    let mut since: Option<Instant> = None;
    while !over.load(Ordering::Relaxed) {
        if let Some(ended) = ranks.ended()
            && since.get_or_insert_with(Instant::now).elapsed() > GRACE
        {
            eprintln!("gptq: {}", terminal::line(&ended.to_string()));
            std::process::exit(1);
        }
        sleep(LOOK);
    }
}
