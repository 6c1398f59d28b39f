//! Where a run's time went.

use std::time::Instant;

use gptq_kernels::Engine;
use gptq_plan::PhaseSeconds;

/// What a run spends its time on, in the order of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Device, tokenisation, embedding.
    Start,
    /// Waiting for a block's weights, and putting them on the device.
    Read,
    /// Running stages, norms and attention.
    Forward,
    /// Accumulating Gram matrices.
    Gram,
    /// Ordering, damping and factoring them.
    Factor,
    /// Grids, codes and output errors.
    Sweep,
    /// Packing, and bringing packed tensors to the host.
    Pack,
    /// Waiting for the files: their queue, their last bytes, their sync.
    Write,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Phase; 8] = [
        Phase::Start,
        Phase::Read,
        Phase::Forward,
        Phase::Gram,
        Phase::Factor,
        Phase::Sweep,
        Phase::Pack,
        Phase::Write,
    ];

    /// For a table.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Start => "start",
            Phase::Read => "read",
            Phase::Forward => "forward",
            Phase::Gram => "Gram",
            Phase::Factor => "factor",
            Phase::Sweep => "sweep",
            Phase::Pack => "pack",
            Phase::Write => "write",
        }
    }
}

/// Seconds of a run's own thread, by phase. On a device that works ahead of its caller the phases
/// are told apart only where the run was asked to wait after each.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    seconds: [f64; Phase::ALL.len()],
    /// The whole run.
    pub total: f64,
}

impl Profile {
    /// Seconds of one phase.
    pub fn seconds(&self, phase: Phase) -> f64 {
        self.seconds[phase as usize]
    }

    /// Every phase, and `other` for what belongs to none: together the whole.
    pub(crate) fn phases(&self) -> Vec<PhaseSeconds> {
        let phases = Phase::ALL.map(|phase| (phase.name(), self.seconds(phase)));
        let all = phases.into_iter().chain([("other", self.rest())]);
        all.map(|(phase, seconds)| PhaseSeconds {
            phase: phase.to_owned(),
            seconds,
        })
        .collect()
    }

    /// Seconds that belong to no phase.
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
    /// `wait` for the device at the end of each measured piece, so that its time is its own.
    pub(crate) fn new(wait: bool) -> Self {
        Clock {
            started: Instant::now(),
            wait,
            seconds: [0.0; Phase::ALL.len()],
        }
    }

    /// Whether pieces are waited for.
    pub(crate) fn waits(&self) -> bool {
        self.wait
    }

    /// Does `work` on the phase's account.
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

    /// Puts all the time so far on the start's account, the first time.
    pub(crate) fn add_start(&mut self) {
        if self.seconds[Phase::Start as usize] == 0.0 {
            self.add(Phase::Start, self.started.elapsed().as_secs_f64());
        }
    }

    /// Puts seconds on a phase's account.
    pub(crate) fn add(&mut self, phase: Phase, seconds: f64) {
        self.seconds[phase as usize] += seconds;
    }

    /// The profile so far.
    pub(crate) fn profile(&self) -> Profile {
        Profile {
            seconds: self.seconds,
            total: self.started.elapsed().as_secs_f64(),
        }
    }
}

/// The result of `work` and its seconds, the device's included if `wait`.
pub(crate) fn timed<B: Engine, T>(
    wait: bool,
    device: &B::Device,
    work: impl FnOnce() -> T,
) -> (T, f64) {
    let started = Instant::now();
    let done = work();
    if wait {
        // A device that fails here fails the next operation too, and is reported there.
        let _ = B::sync(device);
    }
    (done, started.elapsed().as_secs_f64())
}
