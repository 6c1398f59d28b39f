//! `gptq requantize`: runs the recipe of finished branches again with other calibration data.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use gptq_format::branch_dirs;
use gptq_plan::{BranchReport, Measure, Recipe, RecipeOverrides, model_source};
use gptq_verify::{Evaluation, VerifyOptions, verify};
use serde::Serialize;

use crate::cli::RequantizeArgs;
use crate::signals::Signals;
use crate::text_progress::TextProgress;
use crate::{quantize, table};

pub(crate) fn run(args: RequantizeArgs, signals: &Signals) -> Result<()> {
    let before = branches(&args.dir, &args.branch)?;
    let recipe = recipe(&args, &before)?;
    let Some(after) = quantize::produce(&recipe, &args.run, signals)? else {
        return Ok(());
    };
    let evaluation = after.plan.evaluation.clone();
    let request = evaluation.map(|(text, window)| VerifyOptions {
        evaluation: Some(Evaluation { text, window }),
        ..VerifyOptions::default()
    });
    let measure = Measure::of(
        after
            .reports
            .iter()
            .chain(before.iter().map(|(_, old)| old)),
    );
    let mut compared = Vec::new();
    for (i, new) in after.reports.iter().enumerate() {
        let old = before.iter().find(|(_, old)| old.branch == new.branch);
        let (dir, old) = old.context("every branch came from a report")?;
        let perplexity = match &request {
            Some(request) => {
                let mut progress = TextProgress::new(&format!("{} as it was", new.branch));
                let mut show = |done| progress.show(done);
                verify(dir, request, args.run.device.first(), &mut show)?.perplexity
            }
            None => None,
        };
        compared.push(BeforeAfter {
            branch: new.branch.clone(),
            measure,
            mean_error: [new, old].map(|report| report.summary(measure).mean_error),
            perplexity: after
                .perplexities
                .get(i)
                .zip(perplexity)
                .map(|(new, old)| [new.value, old.value]),
            dense_perplexity: after.perplexities.get(i).and_then(|new| new.dense),
        });
    }
    if args.run.json {
        println!("{}", serde_json::to_string_pretty(&compared)?);
        return Ok(());
    }
    println!("\n{}", comparison(&compared, measure));
    println!("written to {}", after.plan.output.display());
    println!(
        "was: {}; each error is on its own calibration data",
        args.dir.display()
    );
    Ok(())
}

/// Results of a branch before and after.
#[derive(Serialize)]
struct BeforeAfter {
    branch: String,
    /// Reference of the errors.
    measure: Measure,
    mean_error: [f64; 2],
    #[serde(skip_serializing_if = "Option::is_none")]
    perplexity: Option<[f64; 2]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dense_perplexity: Option<f64>,
}

fn comparison(compared: &[BeforeAfter], measure: Measure) -> String {
    let mut heading = vec!["branch", measure.name(), "was"];
    if compared.iter().any(|branch| branch.perplexity.is_some()) {
        heading.extend(["perplexity", "was", "dense"]);
    }
    let mut rows = vec![heading.into_iter().map(String::from).collect::<Vec<_>>()];
    for branch in compared {
        let mut row = vec![branch.branch.clone()];
        row.extend(branch.mean_error.map(|error| format!("{error:.3e}")));
        let perplexity = branch.perplexity.into_iter().flatten();
        let dense = branch
            .dense_perplexity
            .filter(|_| branch.perplexity.is_some());
        row.extend(perplexity.chain(dense).map(|p| format!("{p:.4}")));
        rows.push(row);
    }
    table::render(&rows)
}

/// Returns directory and report of every requested branch, `main` first.
fn branches(dir: &Path, names: &[String]) -> Result<Vec<(PathBuf, BranchReport)>> {
    let is_branch = |dir: &Path| dir.join("report.json").is_file();
    let dirs = match is_branch(dir) {
        true => vec![dir.to_owned()],
        false => branch_dirs(dir)?.into_iter().map(|(_, dir)| dir).collect(),
    };
    let mut found = Vec::new();
    for dir in dirs.into_iter().filter(|dir| is_branch(dir)) {
        let report = BranchReport::read(&dir)?;
        found.push((dir, report));
    }
    let known: Vec<String> = found.iter().map(|(_, r)| r.branch.clone()).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(name)) {
        bail!(
            "{}: no branch {name:?}; it has: {}",
            dir.display(),
            known.join(", ")
        );
    }
    found.retain(|(_, report)| names.is_empty() || names.contains(&report.branch));
    ensure!(
        !found.is_empty(),
        "{}: contains no branch with a report.json; name the directory that gptq quantize wrote",
        dir.display()
    );
    Ok(found)
}

/// Returns the recipe of the branches, with the flags of then and of now applied.
fn recipe(args: &RequantizeArgs, before: &[(PathBuf, BranchReport)]) -> Result<Recipe> {
    let (dir, first) = &before[0];
    let settings = |report: &BranchReport| {
        let made = &report.calibration;
        (report.recipe.clone(), made.samples, made.seq_len, made.seed)
    };
    if let Some((_, other)) = before.iter().find(|(_, r)| settings(r) != settings(first)) {
        bail!(
            "{} and {} were made by different recipes; choose one at a time with --branch",
            first.branch,
            other.branch
        );
    }
    let mut recipe = Recipe::parse(&dir.join("report.json"), first.recipe.clone())?;
    let output = args.output.clone().unwrap_or_else(|| {
        let mut name = args.dir.file_name().unwrap_or_default().to_owned();
        name.push("-recalibrated");
        args.dir.with_file_name(name)
    });
    recipe.apply(RecipeOverrides {
        model: args.model.clone(),
        branches: before.iter().map(|(_, r)| r.branch.clone()).collect(),
        calibration: Some(args.calibration.clone()),
        rendering: args.rows.rendering(),
        rows: args.rows.rows.clone(),
        on_error: args.rows.on_error,
        date: args.rows.date.clone(),
        output: Some(output),
        samples: Some(args.samples.unwrap_or(first.calibration.samples)),
        seq_len: Some(args.seq_len.unwrap_or(first.calibration.seq_len)),
        seed: Some(first.calibration.seed),
        evaluation: args.run.perplexity.clone(),
        orders: before
            .iter()
            .map(|(_, r)| (r.branch.clone(), r.order()))
            .collect(),
    })?;
    // A report contains no local directories.
    let model = model_source(&recipe);
    model.map_err(|e| anyhow::anyhow!("{e}; name it with --model"))?;
    Ok(recipe)
}
