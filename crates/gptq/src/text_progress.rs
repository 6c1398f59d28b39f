//! Progress of a long task, such as a text through a model: a bar on a terminal, otherwise a line now and then.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::time_left::rounded;

/// Minimum time between two lines.
const EVERY: Duration = Duration::from_secs(10);

/// Progress of one task.
pub(crate) struct TextProgress {
    name: String,
    /// Name of the share that is done, such as "of the text measured".
    what: &'static str,
    bar: Option<ProgressBar>,
    /// Time and finished share of the first report; earlier time includes other work.
    began: Option<(Instant, f64)>,
    told: Instant,
}

impl TextProgress {
    /// Starts the display under the name of a measurement on a text.
    pub(crate) fn new(name: &str) -> Self {
        Self::of("of the text measured", name)
    }

    /// Starts the display under the name of a task, of which a share is `what`.
    pub(crate) fn of(what: &'static str, name: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{prefix} {bar:30} {pos:>3} % {elapsed}{msg}")
                .expect("the template is a constant");
            let bar = ProgressBar::new(100).with_style(style);
            bar.set_prefix(name.to_owned());
            bar
        });
        TextProgress {
            name: name.to_owned(),
            what,
            bar,
            began: None,
            told: Instant::now(),
        }
    }

    /// Shows the finished share of the work, 0 to 1.
    pub(crate) fn show(&mut self, done: f64) {
        let now = Instant::now();
        let (since, before) = *self.began.get_or_insert((now, done));
        let left = match left(now - since, before, done) {
            Some(left) => format!(", about {} left", rounded(left)),
            None => String::new(),
        };
        let percent = (100.0 * done).round() as u64;
        if let Some(bar) = &self.bar {
            bar.set_message(left);
            bar.set_position(percent);
        } else if now - self.told >= EVERY {
            self.told = now;
            eprintln!("{}: {percent} % {}{left}", self.name, self.what);
        }
    }
}

impl Drop for TextProgress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Estimates the remaining time, if the work from `before` to `done` took `time`.
fn left(time: Duration, before: f64, done: f64) -> Option<Duration> {
    let part = done - before;
    (part > 0.0 && done < 1.0).then(|| time.mul_f64((1.0 - done) / part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_takes_its_share_of_what_the_work_so_far_took() {
        let time = Duration::from_secs(30);
        assert_eq!(left(time, 0.25, 0.5), Some(Duration::from_secs(60)));
        assert_eq!(left(time, 0.25, 0.25), None, "nothing is known yet");
        assert_eq!(left(time, 0.25, 1.0), None, "nothing is left");
    }
}
