//! Time profile of a run.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use gptq_kernels::{DeviceLink, Engine, LinkError, Parcel, ParcelKind, Shipment};
use gptq_plan::PhaseSeconds;
use gptq_ranks::{Cause, Collective, RankError, RankShare};

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
    /// Sending to other ranks.
    Send,
    /// Waiting for what other ranks send.
    Wait,
}

impl Phase {
    /// All phases in order.
    pub const ALL: [Phase; 11] = [
        Phase::Start,
        Phase::Read,
        Phase::Forward,
        Phase::Gram,
        Phase::Factor,
        Phase::Sweep,
        Phase::Tune,
        Phase::Pack,
        Phase::Write,
        Phase::Send,
        Phase::Wait,
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
            Phase::Send => "send",
            Phase::Wait => "wait",
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
    /// True if the run had this phase: a rank that is alone has nobody to send to or wait for.
    pub fn has(&self, phase: Phase) -> bool {
        let between_ranks = matches!(phase, Phase::Send | Phase::Wait);
        !between_ranks || self.seconds(phase) > 0.0
    }

    /// Returns the seconds of one phase.
    pub fn seconds(&self, phase: Phase) -> f64 {
        self.seconds[phase as usize]
    }

    /// Returns its numbers as bytes, for another rank.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let all = self.seconds.iter().chain([&self.total]);
        all.flat_map(|it| it.to_le_bytes()).collect()
    }

    /// Returns the profile of such bytes; of others, one without any time.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Profile {
        let mut numbers = bytes.chunks_exact(8);
        let mut next = || {
            let bytes = numbers.next().and_then(|it| it.try_into().ok());
            bytes.map_or(0.0, f64::from_le_bytes)
        };
        Profile {
            seconds: std::array::from_fn(|_| next()),
            total: next(),
        }
    }

    /// Returns every phase, and `other` for the rest; together they make the total.
    pub(crate) fn phases(&self) -> Vec<PhaseSeconds> {
        let phases = Phase::ALL.into_iter().filter(|phase| self.has(*phase));
        let phases = phases.map(|phase| (phase.name(), self.seconds(phase)));
        let all = phases.chain([("other", self.rest())]);
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
    ranks: Arc<RankTimes>,
}

/// Nanoseconds of sending to other ranks, and of waiting for them.
#[derive(Debug, Default)]
pub(crate) struct RankTimes {
    send: AtomicU64,
    wait: AtomicU64,
}

impl RankTimes {
    fn seconds(of: &AtomicU64) -> f64 {
        of.load(Ordering::Relaxed) as f64 * 1e-9
    }

    fn all(&self) -> f64 {
        RankTimes::seconds(&self.send) + RankTimes::seconds(&self.wait)
    }
}

/// Ranks whose calls are timed.
pub(crate) struct TimedRanks<'a> {
    pub(crate) ranks: &'a dyn Collective,
    pub(crate) times: Arc<RankTimes>,
}

impl TimedRanks<'_> {
    fn timed<T>(&self, to: &AtomicU64, call: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let done = call();
        to.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        done
    }
}

impl Collective for TimedRanks<'_> {
    fn share(&self) -> RankShare {
        self.ranks.share()
    }

    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), RankError> {
        self.timed(&self.times.send, || self.ranks.send(to, bytes))
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>, RankError> {
        self.timed(&self.times.wait, || self.ranks.receive(from))
    }

    fn check(&self) -> Result<(), RankError> {
        self.ranks.check()
    }

    fn end(&self, cause: Cause) {
        self.ranks.end(cause);
    }

    fn leave(&self) -> Result<(), RankError> {
        self.timed(&self.times.wait, || self.ranks.leave())
    }
}

/// A link whose exchanges are timed as sending.
pub(crate) struct TimedLink<'a, B: Engine> {
    pub(crate) link: &'a dyn DeviceLink<B>,
    pub(crate) times: Arc<RankTimes>,
    /// The device to wait for before and after each exchange, so that the times are those of exchanges alone.
    pub(crate) waits: Option<&'a B::Device>,
}

impl<B: Engine> DeviceLink<B> for TimedLink<'_, B> {
    fn exchange(
        &self,
        sent: Shipment<Parcel<B>>,
        expected: &[(usize, ParcelKind)],
    ) -> Result<Vec<Parcel<B>>, LinkError> {
        // A device that fails here also fails in the next operation, which reports it.
        let wait = || self.waits.map(B::sync);
        wait();
        let (started, apart) = (Instant::now(), self.times.all());
        let found = self.link.exchange(sent, expected);
        wait();
        // A link by the host sends messages, which are timed as such.
        let seconds = started.elapsed().as_secs_f64() - (self.times.all() - apart);
        let nanoseconds = (seconds.max(0.0) * 1e9) as u64;
        self.times.send.fetch_add(nanoseconds, Ordering::Relaxed);
        found
    }

    fn abort(&self) {
        self.link.abort();
    }
}

impl Clock {
    /// Starts the clock. With `wait`, it synchronizes with the device after each measured piece, so that
    /// its time is attributed correctly.
    pub(crate) fn new(wait: bool) -> Self {
        Clock {
            started: Instant::now(),
            wait,
            seconds: [0.0; Phase::ALL.len()],
            ranks: Arc::default(),
        }
    }

    /// Returns the times of ranks' calls, which it reckons with.
    pub(crate) fn ranks(&self) -> Arc<RankTimes> {
        self.ranks.clone()
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
        let apart = self.ranks.all();
        let (done, seconds) = timed::<B, T>(self.wait, device, work);
        self.add(phase, seconds - (self.ranks.all() - apart));
        done
    }

    /// Attributes all time so far to the start, the first time it is called.
    pub(crate) fn add_start(&mut self) {
        if self.seconds[Phase::Start as usize] == 0.0 {
            let started = self.started.elapsed().as_secs_f64();
            self.add(Phase::Start, started - self.ranks.all());
        }
    }

    /// Attributes seconds to a phase.
    pub(crate) fn add(&mut self, phase: Phase, seconds: f64) {
        self.seconds[phase as usize] += seconds;
    }

    /// Returns the profile so far.
    pub(crate) fn profile(&self) -> Profile {
        let mut seconds = self.seconds;
        seconds[Phase::Send as usize] = RankTimes::seconds(&self.ranks.send);
        seconds[Phase::Wait as usize] = RankTimes::seconds(&self.ranks.wait);
        Profile {
            seconds,
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
