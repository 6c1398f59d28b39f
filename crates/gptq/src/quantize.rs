//! `gptq quantize`.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Result, anyhow, bail, ensure};
use gptq_export::check_tokenizer;
use gptq_format::{Checkpoint, sha256_file, write_file};
use gptq_kernels::Device;
use gptq_plan::{
    BranchReport, Check, InputSource, Look, Measure, Perplexity, Plan, Recipe, check_texts,
    failures, model_source,
};
use gptq_run::{Event, Outcome, Phase, Profile, RunOptions, unfinished};
use gptq_verify::{Evaluation, RANGE, VerifyOptions, check_tensors, perplexity, verify};
use serde_json::json;

use crate::cli::{QuantizeArgs, RunArgs, warn};
use crate::hub::{self, Need};
use crate::model_recipe::{FoundRecipe, find_recipe};
use crate::progress::Progress;
use crate::ranks::Ranks;
use crate::signals::Signals;
use crate::text_progress::TextProgress;
use crate::{log, plan, size, table, terminal};

/// Finished branches.
pub(crate) struct Produced {
    pub plan: Plan,
    /// Reports in the plan's order.
    pub reports: Vec<BranchReport>,
    /// One per branch, if the plan has an evaluation text.
    pub perplexities: Vec<Perplexity>,
    /// One per rank.
    profiles: Vec<Profile>,
}

pub(crate) fn run(mut args: QuantizeArgs, signals: &Signals) -> Result<()> {
    let evaluation = args.run.perplexity.clone();
    let FoundRecipe { recipe, drafted } = match (&args.resume, &args.recipe) {
        (Some(output), _) => FoundRecipe {
            recipe: resume(output, &mut args.run)?,
            drafted: false,
        },
        (None, Some(recipe)) => find_recipe(recipe, args.draft, args.changes, evaluation, None)?,
        (None, None) => bail!("no recipe"),
    };
    if args.dry_run {
        let mut plan = Plan::new(&recipe, &hub::fetch(&recipe, Need::Shapes, false)?)?;
        plan.warnings.extend(check_texts(&plan, Look::Whole)?);
        check_tokenizer(&plan)?;
        warn(&plan);
        if plan.weights.is_none() && matches!(model_source(&recipe)?, InputSource::Local(_)) {
            // Fails with a message that lists the expected files.
            Checkpoint::open(&plan.model_dir)?;
        }
        let split = plan::Split {
            ranks: args.run.ranks,
            ..plan::Split::default()
        };
        plan::show(&plan, split, args.run.json)?;
        if drafted && !args.run.json {
            println!("\nrecipe of these flags:\n\n{}", recipe.text().trim_end());
        }
        return Ok(());
    }
    let Some(made) = produce(&recipe, &args.run, signals)? else {
        return Ok(());
    };
    if drafted {
        let path = made.plan.output.join("recipe.toml");
        write_file(&path, recipe.text().as_bytes())?;
        eprintln!("recipe of these flags written to {}", path.display());
    }
    if args.run.json {
        let record = record(&made);
        println!("{}", serde_json::to_string_pretty(&record)?);
        return Ok(());
    }
    println!("\n{}", summary(&made.reports, &made.perplexities));
    println!("written to {}, and verified", made.plan.output.display());
    if args.run.profile {
        println!("\n{}", time(&made.profiles).trim_end());
    }
    Ok(())
}

/// Returns the recipe of the interrupted run in `output`, and changes to the directory where that
/// was started. Paths in `args` stay relative to the current directory.
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

/// Runs a recipe, together with the other ranks of the run if there are any; `None` on all but rank 0.
pub(crate) fn produce(
    recipe: &Recipe,
    args: &RunArgs,
    signals: &Signals,
) -> Result<Option<Produced>> {
    let ranks = Ranks::start(args, signals)?;
    let done = produce_on(&ranks, recipe, args, signals);
    ranks.told(done)
}

/// The part of [`produce`] whose errors other ranks are told.
fn produce_on(
    ranks: &Ranks,
    recipe: &Recipe,
    args: &RunArgs,
    signals: &Signals,
) -> Result<Option<Produced>> {
    if let Some(scratch) = &args.scratch {
        // Tokens of the calibration text go there too, which may be tens of gigabytes that are not
        // part of the estimates. A command has a single run.
        let _ = tempfile::env::override_temp_dir(&std::path::absolute(scratch)?);
    }
    let fetched = ranks.root_first(|| hub::fetch(recipe, Need::Weights, ranks.is_root()))?;
    let mut plan = Plan::new(recipe, &fetched)?;
    plan.command = Some(command(std::env::args_os().skip(1)));
    if ranks.is_root() {
        plan.warnings.extend(check_texts(&plan, Look::First)?);
        warn(&plan);
    }
    let mut progress = Progress::new(&plan, args.json);
    let options = RunOptions {
        profile: args.profile,
        device_memory: args.device_memory,
        host_memory: args.host_memory,
        scratch: args.scratch.as_deref(),
        save_every: args.keep_every,
        restart: args.restart,
        stop: signals.stop(),
    };
    let device = ranks.device();
    log::plan(&plan, &args.device.to_string(), ranks.size(), &options);
    let Outcome {
        mut reports,
        profile,
        others,
        lock,
    } = ranks.quantize(&plan, options, &mut |event| {
        if ranks.is_root() {
            log::event(&plan, &event);
        }
        // Before the first block there is nothing to lose.
        if matches!(event, Event::Started { .. }) {
            signals.hold();
        }
        if ranks.is_root() {
            progress.show(event)
        }
    })?;
    signals.release();
    if !ranks.is_root() {
        return Ok(None);
    }
    if signals.status().is_some() {
        bail!("stopped; every branch is complete");
    }

    log::concerns(&reports);
    let evaluation = (plan.evaluation.clone()).map(|(text, window)| Evaluation { text, window });
    let dense = match &evaluation {
        Some(evaluation) => Some(dense(&plan, evaluation, device, &reports)?),
        None => None,
    };
    let beside = evaluation.zip(dense);
    let mut perplexities = Vec::new();
    for (branch, report) in plan.branches.iter().zip(&mut reports) {
        let dir = plan.branch_dir(branch);
        perplexities.extend(prove(&dir, beside.as_ref(), device, report)?);
    }
    drop(lock);
    Ok(Some(Produced {
        plan,
        reports,
        perplexities,
        profiles: [profile].into_iter().chain(others).collect(),
    }))
}

/// Returns the dense model's perplexity, taken from a branch of an earlier run if one has it for
/// the same text.
fn dense(
    plan: &Plan,
    evaluation: &Evaluation,
    device: Device,
    reports: &[BranchReport],
) -> Result<Perplexity> {
    let digest = sha256_file(&evaluation.text)?;
    let known = reports.iter().find_map(|report| {
        let measured = report.perplexity.as_ref()?;
        let same =
            measured.text_sha256.as_ref() == Some(&digest) && measured.window == evaluation.window;
        Some(Perplexity {
            value: measured.dense.filter(|_| same)?,
            ..measured.clone()
        })
    });
    let dense = match known {
        Some(known) => known,
        None => {
            let mut progress = TextProgress::new("dense model");
            let (model, half) = (&plan.model_dir, plan.half);
            let mut show = |done| progress.show(done);
            perplexity(model, half, evaluation, device, &mut show)?
        }
    };
    log::dense_perplexity(&dense);
    Ok(dense)
}

/// Reopens a finished branch and checks every tensor against the recorded digests. If there is an
/// evaluation text, the branch is run on it, and its report gets the perplexity, with the dense
/// model's from `beside`.
fn prove(
    dir: &Path,
    beside: Option<&(Evaluation, Perplexity)>,
    device: Device,
    report: &mut BranchReport,
) -> Result<Option<Perplexity>> {
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
    let Some((evaluation, dense)) = beside else {
        holds(&check_tensors(dir)?)?;
        return Ok(None);
    };
    let request = VerifyOptions {
        evaluation: Some(evaluation.clone()),
        ..VerifyOptions::default()
    };
    let mut progress = TextProgress::new(&report.branch);
    let mut show = |done| progress.show(done);
    let mut receipt = verify(dir, &request, device, &mut show)?;
    drop(progress);
    // The branch itself is correct, and the other branches still have to be measured.
    let too_large = receipt
        .checks
        .extract_if(.., |check| check.name == RANGE && !check.pass);
    for check in too_large {
        log::warning(&format!("{}: {}", report.branch, check.detail));
    }
    holds(&receipt.checks)?;
    let Some(mut measured) = receipt.perplexity else {
        return Ok(None);
    };
    let same = |p: &Perplexity| (p.text_sha256.clone(), p.window, p.tokens);
    measured.dense = (same(&measured) == same(dense)).then_some(dense.value);
    log::perplexity(&report.branch, &measured);
    report.record_perplexity(dir, measured.clone())?;
    Ok(Some(measured))
}

/// Returns the command line in shell syntax. Absolute paths are reduced to their last component, so
/// that a published report has no local directories.
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
        // An argument cannot hold a zero byte, which is all that cannot be quoted.
        let word = format!("{flag}{value}").replace('\0', "");
        shlex::try_quote(&word).map_or_else(|_| word.clone(), Into::into)
    });
    let all: Vec<String> = ["gptq".to_owned()].into_iter().chain(words).collect();
    all.join(" ")
}

/// Returns the result of a run as JSON: the branches in the plan's order.
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
            "perplexity": produced.perplexities.get(i).map(|p| p.value),
        })
    });
    let mut record =
        json!({"branches": branches.collect::<Vec<_>>(), "seconds": produced.profiles[0].total});
    if let Some(dense) = produced.perplexities.iter().find_map(|p| p.dense) {
        record["dense_perplexity"] = dense.into();
    }
    record
}

/// Formats one row per phase, then the remaining time and the total, with the seconds of each rank.
fn time(profiles: &[Profile]) -> String {
    let root = &profiles[0];
    let of = |name: &str, seconds: &dyn Fn(&Profile) -> f64| {
        let share = format!("{:.1} %", 100.0 * seconds(root) / root.total);
        let others = profiles[1..].iter().map(seconds);
        let mut row = vec![name.to_owned(), format!("{:.2}", seconds(root)), share];
        row.extend(others.map(|seconds| format!("{seconds:.2}")));
        row
    };
    let phases = Phase::ALL
        .into_iter()
        .filter(|phase| profiles.iter().any(|it| it.has(*phase)));
    let phases = phases.map(|phase| of(phase.name(), &|profile| profile.seconds(phase)));
    let ends = [
        of("other", &Profile::rest),
        of("total", &|profile| profile.total),
    ];
    let mut heading = ["phase", "seconds", "share"].map(String::from).to_vec();
    if profiles.len() > 1 {
        heading[1] = "rank 0".to_owned();
        heading.extend((1..profiles.len()).map(|rank| format!("rank {rank}")));
    }
    let rows = [heading].into_iter().chain(phases).chain(ends);
    table::render(&rows.collect::<Vec<_>>())
}

/// Formats one row per branch; if each has a perplexity, with columns for it, and a row for the
/// dense model.
fn summary(reports: &[BranchReport], perplexities: &[Perplexity]) -> String {
    let measure = Measure::of(reports);
    let blocks = reports.iter().map(BranchReport::last_block_error);
    let blocks: Option<Vec<f64>> = blocks.collect();
    let mut heading = vec!["branch", "size", measure.name(), "worst", "of rtn"];
    if blocks.is_some() {
        heading.push("last block");
    }
    heading.push("seconds");
    if !perplexities.is_empty() {
        heading.extend(["perplexity", "over dense"]);
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
        if let Some(measured) = perplexities.get(i) {
            row.push(format!("{:.3}", measured.value));
            row.push(over(measured).unwrap_or_else(|| "-".to_owned()));
        }
        rows.push(row);
    }
    let measured_on = dense_row(&mut rows, perplexities);
    table::render(&rows) + &explanation(measure, reports) + &measured_on
}

/// Explains the table's errors in one line.
fn explanation(measure: Measure, reports: &[BranchReport]) -> String {
    let share = reports.iter().find_map(|report| report.compared);
    match (measure, share) {
        (Measure::Output, Some(share)) => format!(
            "output error: of the linear layers and, in \"last block\", of all blocks together, against the dense model's \
             output; on {} calibration tokens\n",
            share.windows * share.tokens
        ),
        _ => "weight error: of the linear layers, against the original weights on the branch's own inputs: not every \
              report has the error against the dense model's output\n"
            .to_owned(),
    }
}

/// Adds a row for the dense model, whose last two columns are those of perplexity; returns a line
/// that names the evaluation text.
fn dense_row(rows: &mut Vec<Vec<String>>, perplexities: &[Perplexity]) -> String {
    let measured = perplexities.iter().find_map(|p| Some((p, p.dense?)));
    let (Some((measured, dense)), Some(heading)) = (measured, rows.first()) else {
        return String::new();
    };
    let mut row = vec!["dense model".to_owned()];
    row.resize(heading.len() - 2, "-".to_owned());
    row.extend([format!("{dense:.3}"), "-".to_owned()]);
    rows.push(row);
    format!(
        "perplexity: on {} tokens of {} in windows of {}\n",
        measured.tokens,
        terminal::line(&measured.text),
        measured.window
    )
}

/// Returns the perplexity increase over the dense model: `"+0.96 %"`.
pub(crate) fn over(measured: &Perplexity) -> Option<String> {
    Some(format!(
        "{:+.2} %",
        100.0 * (measured.value / measured.dense? - 1.0)
    ))
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
            r#"gptq quantize 'my recipe.toml' '--output=out' --calibration "it's.json""#
        );
    }
}
