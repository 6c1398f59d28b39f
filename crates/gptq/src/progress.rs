//! Progress of a run: a bar per branch on a terminal, a line per branch and layer otherwise.

use std::collections::BTreeMap;
use std::io::IsTerminal;

use gptq_pipeline::{Allocation, Choice, Event, LinearReport, Plan};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::size;

/// Turns events into what a person sees.
pub(crate) struct Progress<'a> {
    plan: &'a Plan,
    bars: Option<Vec<ProgressBar>>,
    group: MultiProgress,
    /// Lines go to standard error: standard output is a program's.
    aside: bool,
    /// Per branch, the errors of the layer under way; only where there are no bars.
    layer: BTreeMap<usize, Vec<f64>>,
    /// How many linears each branch quantises, by layer.
    linears: Vec<Vec<usize>>,
}

/// How many linears were given what.
fn given(allocation: &Allocation) -> String {
    let counts = allocation.counts().into_iter();
    let counts = counts.map(|(choice, linears)| {
        let Choice { bits, group_size } = choice;
        format!("{linears} linears at {bits} bits in groups of {group_size}")
    });
    counts.collect::<Vec<_>>().join(", ")
}

impl<'a> Progress<'a> {
    pub(crate) fn new(plan: &'a Plan, aside: bool) -> Self {
        let linears = plan.branches.iter().map(|branch| {
            let mut linears = vec![0; plan.config.layers];
            for linear in branch.planned_linears(&plan.config) {
                linears[linear.layer] += 1;
            }
            linears
        });
        Progress {
            linears: linears.collect(),
            plan,
            bars: None,
            group: MultiProgress::new(),
            aside,
            layer: BTreeMap::new(),
        }
    }

    /// Takes one event.
    pub(crate) fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Started { tokens, linears } => {
                self.say(&format!(
                    "calibrating on {tokens} tokens, {} windows of {}",
                    self.plan.calibration.samples, self.plan.calibration.seq_len
                ));
                if std::io::stderr().is_terminal() {
                    self.bars = Some(self.start_bars(linears));
                }
            }
            Event::Kept { branch, report } => {
                let name = &self.plan.branches[branch].name;
                match &self.bars {
                    Some(bars) => bars[branch].finish_with_message("is there already"),
                    None => self.say(&format!(
                        "{name}: is there already, {}",
                        size::decimal(report.bytes)
                    )),
                }
            }
            Event::Resumed { layers, kept } => self.say(&format!(
                "going on after block {layers} of {} of an unfinished run; going over {} again",
                self.plan.config.layers,
                layers - kept
            )),
            // In the log.
            Event::NotLocked { .. } | Event::StatesKept { .. } | Event::StatesNotKept { .. } => {}
            Event::Measured { layers } => self.say(&format!(
                "measuring what fits the budget: block {layers}/{}",
                self.plan.config.layers
            )),
            Event::Allocated { branch, allocation } => self.say(&format!(
                "{}: {:.3} bits per weight: {}",
                self.plan.branches[branch].name,
                allocation.mean_bits,
                given(allocation)
            )),
            Event::Linear { branch, report } => match &self.bars {
                Some(bars) => {
                    bars[branch].set_message(format!(
                        "layer {} {}",
                        report.layer,
                        report.name.rsplit('.').next().unwrap_or_default()
                    ));
                    bars[branch].inc(1);
                }
                None => self.line(branch, report),
            },
            Event::Finished { branch, report } => {
                let name = &self.plan.branches[branch].name;
                match &self.bars {
                    Some(bars) => bars[branch].finish_with_message(size::decimal(report.bytes)),
                    None => self.say(&format!("{name}: written, {}", size::decimal(report.bytes))),
                }
            }
        }
    }

    fn say(&self, line: &str) {
        self.group.suspend(|| match self.aside {
            true => eprintln!("{line}"),
            false => println!("{line}"),
        });
    }

    fn start_bars(&self, linears: &[usize]) -> Vec<ProgressBar> {
        let width = self
            .plan
            .branches
            .iter()
            .map(|b| b.name.len())
            .max()
            .unwrap_or(0);
        let style =
            ProgressStyle::with_template("{prefix} {bar:30} {pos:>4}/{len:<4} {elapsed:>4} {msg}")
                .expect("the template is a constant");
        let branches = self.plan.branches.iter().zip(linears);
        branches
            .map(|(branch, &n)| {
                self.group.add(
                    ProgressBar::new(n as u64)
                        .with_style(style.clone())
                        .with_prefix(format!("{:<width$}", branch.name)),
                )
            })
            .collect()
    }

    /// A line once the layer's last linear is done.
    fn line(&mut self, branch: usize, report: &LinearReport) {
        let plan = &self.plan.branches[branch];
        let expected = self.linears[branch][report.layer];
        let errors = self.layer.entry(branch).or_default();
        errors.push(report.relative_error);
        if errors.len() == expected {
            let mean = errors.iter().sum::<f64>() / expected as f64;
            errors.clear();
            self.say(&format!(
                "{}: layer {}/{}, mean error {mean:.3e}",
                plan.name,
                report.layer + 1,
                self.plan.config.layers
            ));
        }
    }
}
