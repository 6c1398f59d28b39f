//! Estimates the remaining time of work in equal parts from the parts that are done.

use std::time::{Duration, Instant};

/// Rounds of parts used for an estimate: other programs on the machine may change its pace.
const ROUNDS: usize = 4;

/// Parts that take about the same time each, except the first, in which kernels are compiled and
/// files are read from disk.
pub(crate) struct TimeLeft {
    /// Number of parts.
    parts: usize,
    /// Number of finished parts.
    done: usize,
    /// Parts per round; the first round is ignored once there are others.
    round: usize,
    /// Seconds of each measured part.
    seconds: Vec<f64>,
    /// End of the last part, or start of the work.
    since: Instant,
}

impl TimeLeft {
    /// Starts `parts` in rounds of `round`, of which the first may take longer.
    pub(crate) fn new(parts: usize, round: usize) -> Self {
        TimeLeft {
            parts,
            done: 0,
            round,
            seconds: Vec::new(),
            since: Instant::now(),
        }
    }

    /// Restarts the time of the next part.
    pub(crate) fn begin(&mut self) {
        self.since = Instant::now();
    }

    /// Removes parts that need not be done.
    pub(crate) fn drop_parts(&mut self, parts: usize) {
        self.parts = self.parts.saturating_sub(parts);
    }

    /// Counts a part whose time is not representative.
    pub(crate) fn skip(&mut self) {
        self.done += 1;
        self.since = Instant::now();
    }

    /// Counts a finished part.
    pub(crate) fn part(&mut self) {
        self.part_at(Instant::now());
    }

    fn part_at(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.since).as_secs_f64();
        self.seconds.push(seconds);
        self.since = now;
        self.done += 1;
    }

    /// Returns the remaining time, once a part is done and while others remain.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.left_at(Instant::now())
    }

    fn left_at(&self, now: Instant) -> Option<Duration> {
        let recent = self
            .seconds
            .len()
            .saturating_sub(ROUNDS * self.round.max(1));
        let usual = match self.seconds.get(self.round.max(recent)..) {
            Some(rest) if !rest.is_empty() => rest,
            _ => &self.seconds,
        };
        let rest = self.parts.saturating_sub(self.done);
        if usual.is_empty() || rest == 0 {
            return None;
        }
        let each = usual.iter().sum::<f64>() / usual.len() as f64;
        let gone = now.saturating_duration_since(self.since).as_secs_f64();
        let left = each * rest as f64 - gone.min(each);
        Some(Duration::from_secs_f64(left))
    }

    /// Returns a suffix for a line: `", about 40 s left"`, or nothing.
    pub(crate) fn told(&self) -> String {
        match self.left() {
            Some(left) => format!(", about {} left", rounded(left)),
            None => String::new(),
        }
    }
}

/// Formats like `"8 s"`, `"3 min 20 s"`, `"2 h 05 min"`.
pub(crate) fn rounded(time: Duration) -> String {
    let seconds = time.as_secs_f64().round().max(1.0) as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_three_blocks_the_rest_is_known_though_the_first_was_slow() {
        // Two branches and twelve blocks: 5 s and 3 s for each, of the first three times that.
        let mut left = TimeLeft::new(24, 2);
        let mut now = left.since;
        assert!(left.left_at(now).is_none(), "nothing is known yet");
        for block in 0..3 {
            for seconds in [5, 3] {
                now += Duration::from_secs(if block == 0 { 3 * seconds } else { seconds });
                left.part_at(now);
            }
        }
        let told = left.left_at(now).unwrap().as_secs_f64();
        assert!((told - 72.0).abs() < 1e-6, "nine blocks of 8 s: {told}");
        // The estimate falls during a part, by at most that part's time.
        let later = |seconds| left.left_at(now + Duration::from_secs(seconds));
        assert!((later(2).unwrap().as_secs_f64() - 70.0).abs() < 1e-6);
        assert_eq!(later(100), later(4));
        // After four blocks at half the pace, the estimate uses only those.
        for _ in 0..4 {
            for seconds in [10, 6] {
                now += Duration::from_secs(seconds);
                left.part_at(now);
            }
        }
        let told = left.left_at(now).unwrap().as_secs_f64();
        assert!((told - 80.0).abs() < 1e-6, "five blocks of 16 s: {told}");
    }

    #[test]
    fn parts_of_an_earlier_run_cost_nothing_and_the_last_leaves_nothing() {
        let mut left = TimeLeft::new(4, 1);
        left.skip();
        left.drop_parts(1);
        let now = left.since + Duration::from_secs(10);
        left.part_at(now);
        assert_eq!(left.left_at(now), Some(Duration::from_secs(10)));
        left.part_at(now);
        assert_eq!(left.left_at(now), None);
        assert_eq!(left.told(), "");
    }

    #[test]
    fn times_are_written_as_people_say_them() {
        let said = |seconds| rounded(Duration::from_secs_f64(seconds));
        assert_eq!(said(0.2), "1 s");
        assert_eq!(said(59.6), "1 min 00 s");
        assert_eq!(said(200.0), "3 min 20 s");
        assert_eq!(said(7500.0), "2 h 05 min");
    }
}
