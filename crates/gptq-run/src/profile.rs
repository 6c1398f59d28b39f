//! Time profile of a run.

use std::time::Instant;

use gptq_kernels::Engine;
use gptq_plan::PhaseSeconds;

/// Phases of a run, in the order of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Device, tokenization, embedding.
    Start,
    /// Waiting for a block's weights, and transferring them to the device.
    Read,
    /// Running linear layers, norms and attention.
    Forward,
    /// Accumulating Gram matrices.
    Gram,
    /// Ordering, damping and factoring them.
    Factor,
    /// Grids, codes and output errors.
    Sweep,
    /// Tuning codes and scales.
    Tune,
    /// Packing, and transferring packed tensors to the host.
    Pack,
    /// Waiting for the writer: its queue, the last bytes, the sync.
    Write,
}

impl Phase {
    /// All phases in order.
    pub const ALL: [Phase; 9] = [
        Phase::Start,
        Phase::Read,
        Phase::Forward,
        Phase::Gram,
        Phase::Factor,
        Phase::Sweep,
        Phase::Tune,
        Phase::Pack,
        Phase::Write,
    ];

    /// Returns the name for a table.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Start => "start",
            Phase::Read => "read",
            Phase::Forward => "forward",
            Phase::Gram => "Gram",
            Phase::Factor => "factor",
            Phase::Sweep => "sweep",
            Phase::Tune => "tune",
            Phase::Pack => "pack",
            Phase::Write => "write",
        }
    }
}

/// Seconds of a run's main thread, by phase. On an asynchronous device the phases are separated
/// only if the run synchronizes after each.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    seconds: [f64; Phase::ALL.len()],
    /// Seconds of the whole run.
    pub total: f64,
}

impl Profile {
    /// Returns the seconds of one phase.
    pub fn seconds(&self, phase: Phase) -> f64 {
        self.seconds[phase as usize]
    }

    /// Returns every phase, and `other` for the rest; together they make the total.
    pub(crate) fn phases(&self) -> Vec<PhaseSeconds> {
        let phases = Phase::ALL.map(|phase| (phase.name(), self.seconds(phase)));
        let all = phases.into_iter().chain([("other", self.rest())]);
        all.map(|(phase, seconds)| PhaseSeconds {
            phase: phase.to_owned(),
            seconds,
        })
        .collect()
    }

    /// Returns the seconds outside of all phases.
    pub fn rest(&self) -> f64 {
        self.total - self.seconds.iter().sum::<f64>()
    }
}

/// Measures a [`Profile`].
pub(crate) struct Clock {
    started: Instant,
    wait: bool,
    seconds: [f64; Phase::ALL.len()],
}

impl Clock {
    /// Starts the clock. With `wait`, it synchronizes with the device after each measured piece, so that
    /// its time is attributed correctly.
    pub(crate) fn new(wait: bool) -> Self {
        Clock {
            started: Instant::now(),
            wait,
            seconds: [0.0; Phase::ALL.len()],
        }
    }

    /// Returns true if it synchronizes after each piece.
    pub(crate) fn waits(&self) -> bool {
        self.wait
    }

    /// Runs `work` and attributes its time to `phase`.
    pub(crate) fn measure<B: Engine, T>(
        &mut self,
        phase: Phase,
        device: &B::Device,
        work: impl FnOnce() -> T,
    ) -> T {
        let (done, seconds) = timed::<B, T>(self.wait, device, work);
        self.add(phase, seconds);
        done
    }

    /// Attributes all time so far to the start, the first time it is called.
    pub(crate) fn add_start(&mut self) {
        if self.seconds[Phase::Start as usize] == 0.0 {
            self.add(Phase::Start, self.started.elapsed().as_secs_f64());
        }
    }

    /// Attributes seconds to a phase.
    pub(crate) fn add(&mut self, phase: Phase, seconds: f64) {
        self.seconds[phase as usize] += seconds;
    }

    /// Returns the profile so far.
    pub(crate) fn profile(&self) -> Profile {
        Profile {
            seconds: self.seconds,
            total: self.started.elapsed().as_secs_f64(),
        }
    }
}

/// Returns the result of `work` and its seconds, including the device's if `wait`.
pub(crate) fn timed<B: Engine, T>(
    wait: bool,
    device: &B::Device,
    work: impl FnOnce() -> T,
) -> (T, f64) {
    let started = Instant::now();
    let done = work();
    if wait {
        // A device that fails here also fails in the next operation, which reports it.
        let _ = B::sync(device);
    }
    (done, started.elapsed().as_secs_f64())
}
