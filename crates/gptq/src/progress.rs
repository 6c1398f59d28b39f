//! Progress of a run: a bar per branch on a terminal, a line per branch and layer otherwise.

use std::collections::BTreeMap;
use std::io::IsTerminal;

use gptq_plan::{Allocation, BranchPlan, Choice, LinearReport, Measure, Plan};
use gptq_run::Event;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::time_left::TimeLeft;
use crate::{size, table};

/// Displays events of a run.
pub(crate) struct Progress<'a> {
    plan: &'a Plan,
    bars: Option<Vec<ProgressBar>>,
    group: MultiProgress,
    /// Print lines to standard error, as standard output is for JSON.
    aside: bool,
    /// Number of linear layers to quantize, by layer, for each branch.
    expected: Vec<BTreeMap<usize, usize>>,
    /// Errors of the current layer, by branch.
    layer: BTreeMap<usize, Vec<f64>>,
    /// Layers of the current branches that an interrupted run finished.
    restored: usize,
    /// One part is one layer of a branch.
    left: TimeLeft,
    /// One part is one layer of the sensitivity pass.
    measuring: Option<TimeLeft>,
}

/// Returns the number of linear layers that a branch quantizes, by layer.
fn expected(plan: &Plan, branch: &BranchPlan) -> BTreeMap<usize, usize> {
    let mut layers = BTreeMap::new();
    for linear in branch.planned_linears(&plan.config) {
        *layers.entry(linear.layer).or_insert(0) += 1;
    }
    layers
}

/// Summarizes the settings that the linear layers were given.
fn given(allocation: &Allocation) -> String {
    let counts = allocation.counts().into_iter();
    let counts = counts.map(|(choice, linears)| {
        let Choice { bits, group_size } = choice;
        format!("{linears} linear layers at {bits} bits in groups of {group_size}")
    });
    counts.collect::<Vec<_>>().join(", ")
}

impl<'a> Progress<'a> {
    pub(crate) fn new(plan: &'a Plan, aside: bool) -> Self {
        let expected: Vec<_> = (plan.branches.iter())
            .map(|branch| expected(plan, branch))
            .collect();
        let parts = expected.iter().map(BTreeMap::len).sum();
        Progress {
            left: TimeLeft::new(parts, plan.branches.len()),
            measuring: None,
            restored: 0,
            expected,
            plan,
            bars: None,
            group: MultiProgress::new(),
            aside,
            layer: BTreeMap::new(),
        }
    }

    /// Displays one event.
    pub(crate) fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Started { tokens, linears } => {
                self.say(&format!(
                    "calibrating on {tokens} tokens, {} of {}",
                    table::count(self.plan.calibration.samples, "window"),
                    self.plan.calibration.seq_len
                ));
                if std::io::stderr().is_terminal() {
                    self.bars = Some(self.start_bars(linears));
                }
                self.left.begin();
            }
            Event::AlreadyFinished { branch, report } => {
                self.left.drop_parts(self.expected[branch].len());
                let name = &self.plan.branches[branch].name;
                match &self.bars {
                    Some(bars) => bars[branch].finish_with_message("already finished, skipped"),
                    None => self.say(&format!(
                        "{name}: already finished, skipped, {}",
                        size::decimal(report.bytes)
                    )),
                }
            }
            Event::Resumed { layers, kept } => {
                self.restored = layers;
                self.say(&format!(
                    "resuming after block {layers} of {} of an interrupted run; running {} of them again",
                    self.plan.config.layers,
                    layers - kept
                ));
            }
            // Logged only.
            Event::Block { .. }
            | Event::Calibrated { .. }
            | Event::NotLocked { .. }
            | Event::StatesSaved { .. }
            | Event::StatesNotSaved { .. } => {}
            Event::Measured { layers } => {
                let blocks = self.plan.config.layers;
                let measuring = self
                    .measuring
                    .get_or_insert_with(|| TimeLeft::new(blocks, 0));
                // The first block's time is unknown, and not representative.
                match layers {
                    1 => measuring.skip(),
                    _ => measuring.part(),
                }
                let left = measuring.told();
                self.left.begin();
                self.say(&format!("sensitivity pass: block {layers}/{blocks}{left}"));
            }
            Event::Allocated { branch, allocation } => self.say(&format!(
                "{}: {:.3} bits per weight: {}",
                self.plan.branches[branch].name,
                allocation.mean_bits,
                given(allocation)
            )),
            Event::Linear { branch, report } => self.linear(branch, report),
            Event::Finished { branch, report } => {
                // Further passes start from the first layer.
                self.restored = 0;
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

    /// Prints a line after the layer's last linear layer, or advances the branch's bar.
    fn linear(&mut self, branch: usize, report: &LinearReport) {
        let layer = report.layer;
        let (error, measure) = match report.output_error {
            Some(error) => (error, Measure::Output),
            None => (report.relative_error, Measure::Weights),
        };
        let errors = self.layer.entry(branch).or_default();
        errors.push(error);
        let mut mean = None;
        if self.expected[branch].get(&layer) == Some(&errors.len()) {
            mean = Some(errors.iter().sum::<f64>() / errors.len() as f64);
            errors.clear();
            match layer < self.restored {
                true => self.left.skip(),
                false => self.left.part(),
            }
        }
        let mut left = self.left.told();
        if !left.is_empty() && self.plan.evaluation.is_some() {
            left += ", then perplexity";
        }
        if let Some(bars) = &self.bars {
            let linear = report.name.rsplit('.').next().unwrap_or_default();
            bars[branch].set_message(format!("layer {layer} {linear}{left}"));
            bars[branch].inc(1);
        } else if let Some(mean) = mean {
            self.say(&format!(
                "{}: layer {}/{}, {} {mean:.3e}{left}",
                self.plan.branches[branch].name,
                layer + 1,
                self.plan.config.layers,
                measure.name()
            ));
        }
    }
}
