//! `gptq quantize`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail, ensure};
use gptq_format::Checkpoint;
use gptq_kernels::Device;
use gptq_pipeline::{
    BranchReport, Event, InputSource, Look, Measure, Outcome, Perplexity, Phase, Plan, Profile,
    Recipe, RunOptions, check_texts, quantise, unfinished,
};
use gptq_verify::{Check, Evaluation, Request, check_tensors, failures, verify};
use serde_json::json;

use crate::block_progress::BlockProgress;
use crate::cli::{QuantizeArgs, RunArgs, warn};
use crate::hub::{self, Need};
use crate::progress::Progress;
use crate::signals::Signals;
use crate::{log, plan, size, table};

/// Finished branches.
pub(crate) struct Produced {
    pub plan: Plan,
    /// In the plan's order.
    pub reports: Vec<BranchReport>,
    /// One each, where the plan has an evaluation text.
    pub perplexities: Vec<f64>,
    profile: Profile,
}

pub(crate) fn run(mut args: QuantizeArgs, signals: &Signals) -> Result<()> {
    let recipe = match (&args.resume, &args.recipe) {
        (Some(output), _) => resume(output, &mut args.run)?,
        (None, Some(recipe)) => args.changes.load(recipe, args.run.perplexity.clone())?,
        (None, None) => bail!("no recipe"),
    };
    if args.dry_run {
        let mut plan = Plan::new(&recipe, &hub::fetch(&recipe, Need::Shapes, false)?)?;
        plan.warnings.extend(check_texts(&plan, Look::Whole)?);
        warn(&plan);
        if plan.weights.is_none() && matches!(recipe.model_source()?, InputSource::Local(_)) {
            // Says what was looked for.
            Checkpoint::open(&plan.model_dir)?;
        }
        return plan::show(&plan, args.run.json);
    }
    let made = produce(&recipe, &args.run, signals)?;
    if args.run.json {
        let record = record(&made);
        println!("{}", serde_json::to_string_pretty(&record)?);
        return Ok(());
    }
    println!("\n{}", summary(&made.reports, &made.perplexities));
    println!("written to {}, and read back", made.plan.output.display());
    if args.run.profile {
        println!("\n{}", time(&made.profile).trim_end());
    }
    Ok(())
}

/// The recipe of the unfinished run in `output`, seen from where that was begun. Paths of `args` stay what
/// they are from where the command was given.
fn resume(output: &Path, args: &mut RunArgs) -> Result<Recipe> {
    let absolute =
        |path: &Path| std::path::absolute(path).map_err(|e| anyhow!("{}: {e}", path.display()));
    let output = absolute(output)?;
    for path in [&mut args.perplexity, &mut args.scratch] {
        *path = path.as_deref().map(absolute).transpose()?;
    }
    let (recipe, directory) = unfinished(&output, args.perplexity.clone())?;
    std::env::set_current_dir(&directory).map_err(|e| anyhow!("{}: {e}", directory.display()))?;
    Ok(recipe)
}

/// Carries a recipe out.
pub(crate) fn produce(recipe: &Recipe, args: &RunArgs, signals: &Signals) -> Result<Produced> {
    if let Some(scratch) = &args.scratch {
        // Tokens of the calibration text go there too, which may be tens of gigabytes: only hidden states are
        // counted beforehand. A command has one run.
        let _ = tempfile::env::override_temp_dir(&std::path::absolute(scratch)?);
    }
    let mut plan = Plan::new(recipe, &hub::fetch(recipe, Need::Weights, true)?)?;
    plan.command = Some(command(std::env::args_os().skip(1)));
    plan.warnings.extend(check_texts(&plan, Look::First)?);
    warn(&plan);
    let mut progress = Progress::new(&plan, args.json);
    let options = RunOptions {
        profile: args.profile,
        device_memory: args.device_memory,
        host_memory: args.host_memory,
        scratch: args.scratch.as_deref(),
        keep_every: args.keep_every,
        restart: args.restart,
        stop: signals.stop(),
    };
    log::plan(&plan, &args.device.to_string(), &options);
    let Outcome {
        mut reports,
        profile,
        lock,
    } = quantise(&plan, args.device, options, &mut |event| {
        log::event(&plan, &event);
        // Until the blocks begin there is nothing to lose.
        if matches!(event, Event::Started { .. }) {
            signals.hold();
        }
        progress.show(event)
    })?;
    signals.release();
    if signals.status().is_some() {
        bail!("stopped; every branch is in place");
    }

    log::concerns(&reports);
    let mut perplexities = Vec::new();
    for (branch, report) in plan.branches.iter().zip(&mut reports) {
        let dir = plan.branch_dir(branch);
        perplexities.extend(prove(&dir, plan.evaluation.as_ref(), args.device, report)?);
    }
    drop(lock);
    Ok(Produced {
        plan,
        reports,
        perplexities,
        profile,
    })
}

/// Reopens a finished branch: every tensor is to be what the solver found, and where there is a text
/// to measure on the branch is run, and its report has the perplexity.
fn prove(
    dir: &Path,
    evaluation: Option<&(PathBuf, usize)>,
    device: Device,
    report: &mut BranchReport,
) -> Result<Option<f64>> {
    let holds = |checks: &[Check]| {
        let failed = failures(checks);
        ensure!(
            failed.is_empty(),
            "{}: {}",
            dir.display(),
            failed.join("; ")
        );
        Ok(())
    };
    let Some((text, window)) = evaluation.cloned() else {
        holds(&check_tensors(dir)?)?;
        return Ok(None);
    };
    let request = Request {
        evaluation: Some(Evaluation { text, window }),
        ..Request::default()
    };
    let mut progress = BlockProgress::new(&report.branch);
    let mut show = |done, blocks| progress.show(done, blocks);
    let receipt = verify(dir, &request, device, &mut show)?;
    drop(progress);
    holds(&receipt.checks)?;
    let Some(measured) = receipt.perplexity else {
        return Ok(None);
    };
    log::perplexity(&report.branch, &measured);
    let measured = Perplexity {
        text: measured.text,
        window: measured.window,
        tokens: measured.tokens,
        value: measured.value,
        dense: measured.dense,
    };
    let value = measured.value;
    report.record_perplexity(dir, measured)?;
    Ok(Some(value))
}

/// The command line as a shell reads it. Of an absolute path only the last component stays, so that
/// a published report names no place of this machine.
fn command(args: impl Iterator<Item = OsString>) -> String {
    let words = args.map(|arg| {
        let arg = arg.to_string_lossy();
        let (flag, value) = match arg.split_once('=') {
            Some((flag, value)) if flag.starts_with("--") => (format!("{flag}="), value),
            _ => (String::new(), arg.as_ref()),
        };
        let path = Path::new(value);
        let value = match path.file_name() {
            Some(name) if path.is_absolute() => name.to_string_lossy(),
            _ => value.into(),
        };
        let word = format!("{flag}{value}");
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@+".contains(c);
        match !word.is_empty() && word.chars().all(plain) {
            true => word,
            false => format!("'{}'", word.replace('\'', r"'\''")),
        }
    });
    ["gptq".to_owned()]
        .into_iter()
        .chain(words)
        .collect::<Vec<_>>()
        .join(" ")
}

/// What came of a run, for programs: the branches in the plan's order.
fn record(produced: &Produced) -> serde_json::Value {
    let Produced { plan, reports, .. } = produced;
    let measure = Measure::of(reports);
    let branches = plan.branches.iter().zip(reports).enumerate();
    let branches = branches.map(|(i, (branch, report))| {
        let numbers = report.summary(measure);
        json!({
            "name": report.branch,
            "dir": plan.branch_dir(branch),
            "bytes": report.bytes,
            "measure": measure,
            "mean_error": numbers.mean_error,
            "worst_error": numbers.worst_error,
            "mean_ratio": numbers.mean_ratio,
            "last_block_error": report.last_block_error(),
            "mean_objective": report.mean_objective(),
            "seconds": report.seconds,
            "perplexity": produced.perplexities.get(i),
        })
    });
    json!({"branches": branches.collect::<Vec<_>>(), "seconds": produced.profile.total})
}

/// A row per phase, then what no phase has and the whole.
fn time(profile: &Profile) -> String {
    let phases = Phase::ALL.map(|phase| (phase.name(), profile.seconds(phase)));
    let ends = [("other", profile.rest()), ("total", profile.total)];
    let rows = phases.into_iter().chain(ends).map(|(name, seconds)| {
        let share = 100.0 * seconds / profile.total;
        [
            name.to_owned(),
            format!("{seconds:.2}"),
            format!("{share:.1} %"),
        ]
        .to_vec()
    });
    let heading = ["phase", "seconds", "share"].map(String::from).to_vec();
    table::render(&[heading].into_iter().chain(rows).collect::<Vec<_>>())
}

/// A row per branch; a perplexity column if there is one for each.
fn summary(reports: &[BranchReport], perplexities: &[f64]) -> String {
    let measure = Measure::of(reports);
    let blocks = reports.iter().map(BranchReport::last_block_error);
    let blocks: Option<Vec<f64>> = blocks.collect();
    let mut heading = vec!["branch", "size", measure.name(), "worst", "of rtn"];
    if blocks.is_some() {
        heading.push("last block");
    }
    heading.push("seconds");
    if !perplexities.is_empty() {
        heading.push("perplexity");
    }
    let mut rows = vec![heading.into_iter().map(String::from).collect::<Vec<_>>()];
    for (i, report) in reports.iter().enumerate() {
        let numbers = report.summary(measure);
        let mut row = vec![
            report.branch.clone(),
            size::decimal(report.bytes),
            format!("{:.3e}", numbers.mean_error),
            format!("{:.3e}", numbers.worst_error),
            format!("{:.3}", numbers.mean_ratio),
        ];
        row.extend(blocks.iter().map(|blocks| format!("{:.3e}", blocks[i])));
        row.push(format!("{:.1}", report.seconds));
        row.extend(perplexities.get(i).map(|p| format!("{p:.3}")));
        rows.push(row);
    }
    table::render(&rows) + &explanation(measure, reports)
}

/// What the table's errors are, in a line.
fn explanation(measure: Measure, reports: &[BranchReport]) -> String {
    let share = reports.iter().find_map(|report| report.compared);
    match (measure, share) {
        (Measure::Output, Some(share)) => format!(
            "output error: of the linears and, in \"last block\", of all blocks together, against the dense model's \
             output; on {} calibration tokens\n",
            share.windows * share.tokens
        ),
        _ => "weight error: of the linears, against the original weights on the branch's own inputs: not every \
              report has the error against the dense model's output\n"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_command_can_be_pasted_and_names_no_local_directory() {
        let args = [
            "quantize",
            "/home/me/my recipe.toml",
            "--output=/mnt/out",
            "--calibration",
            "it's.json",
        ];
        assert_eq!(
            command(args.into_iter().map(OsString::from)),
            r"gptq quantize 'my recipe.toml' --output=out --calibration 'it'\''s.json'"
        );
    }
}
