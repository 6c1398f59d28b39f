//! Logging of a run: `--log-file FILE`, and `RUST_LOG` as usual in Rust.
//!
//! Without either, nothing is logged; warnings are printed in any case. `RUST_LOG` alone logs to
//! standard error; `--log-file` logs to the file, by default at `info` for this program and `warn`
//! for libraries. The Hub's token is removed from every line, whichever library wrote it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use anyhow::{Result, anyhow};
use gptq_calibration::Manifest;
use gptq_plan::{
    Allocation, BranchReport, Choice, ExpertSpread, LinearReport, Measure, Perplexity, Plan,
    Propagation,
};
use gptq_run::{Event, RunOptions};
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::terminal;

/// Filter of the log file if `RUST_LOG` is not set.
const DEFAULT: &str = "warn,gptq=info";

/// Replacement for a secret.
const HIDDEN: &str = "[secret]";

/// Starts logging. `secrets` are removed from every line.
///
/// # Errors
/// A log file that cannot be written, or a `RUST_LOG` that does not parse.
pub(crate) fn start(
    file: Option<&Path>,
    rust_log: Option<String>,
    secrets: Vec<String>,
) -> Result<()> {
    if file.is_none() && rust_log.is_none() {
        return Ok(());
    }
    let filter = EnvFilter::try_new(rust_log.as_deref().unwrap_or(DEFAULT))
        .map_err(|e| anyhow!("RUST_LOG: {e}"))?;
    let sink = match file {
        Some(path) => LogTarget::File(
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .map_err(|e| anyhow!("--log-file {}: {e}", path.display()))?,
        ),
        None => LogTarget::StandardError,
    };
    // A second call has no effect.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(Log(Arc::new(Mutex::new(Inner {
            sink,
            secrets: secrets.into_iter().filter(|s| !s.is_empty()).collect(),
        }))))
        .try_init();
    Ok(())
}

/// Start of every line, if this process is a rank of a run.
static RANK: OnceLock<String> = OnceLock::new();

/// Makes every line of the log from now on say which rank it is of.
pub(crate) fn rank(rank: usize) {
    // A process is one rank of one run.
    let _ = RANK.set(format!("rank {rank} "));
}

/// Prints a warning to standard error and logs it.
pub(crate) fn warning(text: &str) {
    eprintln!("gptq: warning: {}", terminal::line(text));
    warn!("{text}");
}

/// Prints a note to standard error and logs it.
pub(crate) fn note(text: &str) {
    eprintln!("gptq: {}", terminal::line(text));
    info!("{text}");
}

/// Logs the plan of a run.
pub(crate) fn plan(plan: &Plan, device: &str, ranks: usize, options: &RunOptions<'_>) {
    info!(
        version = env!("CARGO_PKG_VERSION"),
        model = plan.model_name,
        device,
        ranks,
        command = plan.command.as_deref().unwrap_or_default(),
        propagation = match plan.propagation {
            Propagation::Quantized => "quantized",
            Propagation::Dense => "dense",
        },
        "run"
    );
    info!(
        device_memory = options.device_memory,
        host_memory = options.host_memory,
        scratch = options.scratch.map(|dir| dir.display().to_string()),
        keep_every = %humantime::format_duration(options.save_every),
        restart = options.restart,
        "limits"
    );
    for branch in &plan.branches {
        info!(
            branch = branch.name,
            bits = %branch.bits,
            group_size = %branch.group_size,
            group_note = branch.group_note.as_deref(),
            budget_bits = branch.budget.as_ref().map(|budget| budget.bits),
            desc_act = branch.desc_act,
            static_groups = branch.static_groups,
            sym = branch.sym,
            true_sequential = branch.true_sequential,
            damp_percent = branch.damp_percent,
            preset = branch.preset.name(),
            method = serde_json::to_string(&branch.method).unwrap_or_default(),
            "branch"
        );
    }
    info!(recipe = plan.recipe, "recipe");
}

/// Logs an event of a run.
pub(crate) fn event(plan: &Plan, event: &Event<'_>) {
    match event {
        Event::NotLocked { dir } => warning(&format!(
            "{}: this file system has no locks; make sure that no second run writes there at the same time",
            dir.display()
        )),
        Event::Calibrated { warnings } => {
            // The plan's own warnings are already printed.
            let new = warnings.iter().filter(|line| !plan.warnings.contains(line));
            new.for_each(|line| warning(line));
        }
        Event::Started { tokens, .. } => info!(tokens, "calibrating"),
        Event::Linear { branch, report } => {
            let branch = &plan.branches[*branch];
            linear(&branch.name, branch.damp_percent, report);
        }
        Event::Block { branch, report } => {
            let spread = ExpertSpread::of([*report]);
            info!(
                branch = plan.branches[*branch].name,
                layer = report.layer,
                output_error = report.output_error,
                least_expert_tokens = spread.map(|it| it.least.2),
                experts_with_few_tokens = spread.map(|it| it.few),
                "block"
            );
        }
        Event::Finished { report, .. } => {
            branch(report);
            let spread = ExpertSpread::of(&report.blocks);
            if let Some(line) = spread.and_then(|it| it.warning()) {
                warning(&format!("{}: {line}", report.branch));
            }
        }
        Event::AlreadyFinished { report, .. } => {
            info!(branch = report.branch, "finished by an earlier run")
        }
        Event::Resumed { layers, kept } => info!(layers, kept, "resuming an interrupted run"),
        Event::StatesSaved { layers } => info!(layers, "hidden states saved"),
        Event::Measured { layers } => info!(layers, "sensitivity pass"),
        Event::Allocated { branch, allocation } => {
            allocated(&plan.branches[*branch].name, allocation);
        }
        Event::StatesNotSaved { layers, why } => info!(layers, why, "hidden states not saved"),
    }
}

/// Logs the perplexity of a finished branch.
pub(crate) fn perplexity(branch: &str, measured: &Perplexity) {
    let (text, window) = (measured.text.as_str(), measured.window);
    info!(
        branch,
        text,
        window,
        perplexity = measured.value,
        dense = measured.dense,
        "measured"
    );
}

/// Logs the perplexity of the dense model.
pub(crate) fn dense_perplexity(measured: &Perplexity) {
    let (text, window) = (measured.text.as_str(), measured.window);
    let perplexity = measured.value;
    info!(text, window, perplexity, "measured the dense model");
}

/// Warns about finished branches, one line each.
pub(crate) fn concerns(reports: &[BranchReport]) {
    for report in reports {
        let worse = report.linears.iter().filter(|l| l.is_worse_than_rtn());
        let measure = Measure::of([report]);
        let ratio = |l: &LinearReport| l.of_rtn(measure);
        if let Some(worst) = (worse.clone()).max_by(|a, b| ratio(a).total_cmp(&ratio(b))) {
            warning(&format!(
                "{}: {} of {} linear layers are worse than round-to-nearest, the worst is {} (ratio {:.3}); use more \
                 calibration tokens, or text closer to the intended use of the model",
                report.branch,
                worse.count(),
                report.linears.len(),
                worst.name,
                ratio(worst)
            ));
        }
        if let Some(first) = report.clamped.first() {
            let values: usize = report.clamped.iter().map(|c| c.values).sum();
            warning(&format!(
                "{}: {values} values of hidden states were beyond f16's range and clamped, first after \
                 {} of block {}",
                report.branch, first.after, first.layer
            ));
        }
    }
}

/// Logs a mixed-precision allocation.
fn allocated(branch: &str, allocation: &Allocation) {
    info!(
        branch,
        budget_bits = allocation.budget_bits,
        mean_bits = allocation.mean_bits,
        choices = serde_json::to_string(&allocation.choices).unwrap_or_default(),
        "budget"
    );
    for group in &allocation.groups {
        if let Some(Choice { bits, group_size }) = allocation.choices.get(group.choice) {
            let (layer, linears, losses) = (group.layer, group.linears.join(", "), &group.losses);
            info!(branch, layer, linears, %bits, %group_size, ?losses, "picked");
        }
    }
}

/// Logs a quantized linear layer; anything unusual about it is a warning.
fn linear(branch: &str, asked: f64, report: &LinearReport) {
    let name = &report.name;
    info!(
        branch,
        layer = report.layer,
        name,
        bits = %report.bits,
        group_size = %report.group_size,
        relative_error = report.relative_error,
        rtn_error = report.rtn_error,
        ratio = report.ratio,
        output_error = report.output_error,
        rtn_output_error = report.rtn_output_error,
        solver_objective = report.solver_objective,
        gains = gains(report),
        damping = report.damp_percent,
        dead_columns = report.dead_columns,
        seconds = report.seconds,
        "linear"
    );
    if report.damp_percent > asked {
        let used = report.damp_percent;
        warn!(
            branch,
            name, asked, used, "damping raised: the factorization failed with less"
        );
    }
    if report.dead_columns > 0 {
        let dead_columns = report.dead_columns;
        warn!(
            branch,
            name, dead_columns, "inputs that were always zero; their weights are set to zero"
        );
    }
    if report.is_worse_than_rtn() {
        let measure = match report.output_error {
            Some(_) => Measure::Output,
            None => Measure::Weights,
        };
        let [error, rtn] = report.errors(measure);
        warn!(branch, name, error, rtn, "worse than round-to-nearest");
    }
}

/// Formats the gains of the options beyond plain GPTQ, such as `scale_search 1.2e-3`.
fn gains(report: &LinearReport) -> String {
    let used = report.gains.used();
    let each: Vec<String> = used
        .map(|(name, gain)| format!("{name} {gain:.2e}"))
        .collect();
    each.join(", ")
}

/// Logs a finished branch.
fn branch(report: &BranchReport) {
    calibration(&report.calibration);
    let measure = Measure::of([report]);
    let numbers = report.summary(measure);
    info!(
        branch = report.branch,
        device = report.device,
        bytes = report.bytes,
        seconds = report.seconds,
        measure = measure.name(),
        mean_error = numbers.mean_error,
        worst_error = numbers.worst_error,
        mean_ratio = numbers.mean_ratio,
        last_block_error = report.last_block_error(),
        mean_objective = report.mean_objective(),
        "written"
    );
    for phase in &report.phases {
        info!(phase = phase.phase, seconds = phase.seconds, "time");
    }
}

fn calibration(manifest: &Manifest) {
    match serde_json::to_string(manifest) {
        Ok(manifest) => info!(manifest, "calibration"),
        Err(error) => warn!(%error, "the calibration manifest cannot be written"),
    }
}

/// Destination of log lines.
enum LogTarget {
    File(File),
    StandardError,
}

struct Inner {
    sink: LogTarget,
    secrets: Vec<String>,
}

/// Writes whole lines, as `tracing_subscriber::fmt` provides them.
#[derive(Clone)]
struct Log(Arc<Mutex<Inner>>);

impl<'a> MakeWriter<'a> for Log {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        self.clone()
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let line_of = RANK.get().map_or("", String::as_str);
        let text = String::from_utf8_lossy(line);
        let clean = hide(&format!("{line_of}{text}"), &inner.secrets);
        let clean = terminal::lines(&clean);
        match &mut inner.sink {
            LogTarget::File(file) => file.write_all(clean.as_bytes())?,
            LogTarget::StandardError => io::stderr().write_all(clean.as_bytes())?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn hide(line: &str, secrets: &[String]) -> String {
    secrets
        .iter()
        .fold(line.to_owned(), |line, secret| line.replace(secret, HIDDEN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_hidden_wherever_it_stands() {
        let secrets = ["hf_abc".to_owned(), "other".to_owned()];
        assert_eq!(
            hide(
                "Authorization: Bearer hf_abc\\n{\"t\":\"hf_abc\"} other",
                &secrets
            ),
            "Authorization: Bearer [secret]\\n{\"t\":\"[secret]\"} [secret]"
        );
    }
}
