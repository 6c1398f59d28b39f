//! Progress of text through a model's blocks: a bar on a terminal, now and then a line otherwise.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::time_left::TimeLeft;

/// Between two lines: what is done sooner needs none.
const EVERY: Duration = Duration::from_secs(10);

/// One text on its way through one model.
pub(crate) struct BlockProgress {
    name: String,
    bar: Option<ProgressBar>,
    left: Option<TimeLeft>,
    told: Instant,
}

impl BlockProgress {
    /// Under the name of what is measured.
    pub(crate) fn new(name: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template("{prefix} {bar:30} block {pos}/{len} {elapsed}{msg}")
                    .expect("the template is a constant");
            let bar = ProgressBar::new(0).with_style(style);
            bar.set_prefix(name.to_owned());
            bar
        });
        BlockProgress {
            name: name.to_owned(),
            bar,
            left: None,
            told: Instant::now(),
        }
    }

    /// So many of the blocks are done.
    pub(crate) fn show(&mut self, done: usize, blocks: usize) {
        // The first block comes after the text was tokenised, which is no part of the others.
        let left = self.left.get_or_insert_with(|| TimeLeft::new(blocks, 0));
        if done <= 1 {
            left.skip();
        } else {
            left.part();
        }
        let told = left.told();
        if let Some(bar) = &self.bar {
            bar.set_length(blocks as u64);
            bar.set_message(told);
            bar.set_position(done as u64);
        } else if self.told.elapsed() >= EVERY {
            self.told = Instant::now();
            eprintln!("{}: measuring, block {done}/{blocks}{told}", self.name);
        }
    }
}

impl Drop for BlockProgress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
