//! `gptq quantize`.

use anyhow::Result;
use gptq_pipeline::{BranchReport, Outcome, Phase, Plan, Profile, RunOptions, quantise};
use gptq_verify::{Evaluation, verify};

use crate::cli::{QuantizeArgs, warn};
use crate::progress::Progress;
use crate::{plan, size, table};

pub(crate) fn run(args: QuantizeArgs) -> Result<()> {
    let recipe = args.recipe.load(args.perplexity)?;
    let plan = Plan::new(&recipe)?;
    warn(&plan);
    if args.dry_run {
        plan::print(&plan);
        return Ok(());
    }
    let mut progress = Progress::new(&plan);
    let options = RunOptions {
        profile: args.profile,
        device_memory: args.device_memory,
    };
    let Outcome { reports, profile } = quantise(&plan, args.device, options, &mut |event| {
        progress.show(event)
    })?;

    let evaluation = plan.evaluation.clone();
    let mut perplexities = Vec::new();
    if let Some((text, window)) = evaluation {
        let evaluation = Evaluation { text, window };
        for branch in &plan.branches {
            let verdict = verify(
                &plan.branch_dir(branch),
                Some(&evaluation),
                None,
                args.device,
            )?;
            perplexities.extend(verdict.perplexity);
        }
    }
    println!("\n{}", summary(&reports, &perplexities));
    println!("written to {}", plan.output.display());
    if args.profile {
        println!("\n{}", time(&profile).trim_end());
    }
    Ok(())
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
    let mut heading = vec![
        "branch",
        "size",
        "mean error",
        "worst error",
        "of rtn",
        "seconds",
    ];
    if !perplexities.is_empty() {
        heading.push("perplexity");
    }
    let mut rows = vec![heading.into_iter().map(String::from).collect::<Vec<_>>()];
    for (i, report) in reports.iter().enumerate() {
        let numbers = report.summary();
        let mut row = vec![
            report.branch.clone(),
            size::decimal(report.bytes),
            format!("{:.3e}", numbers.mean_error),
            format!("{:.3e}", numbers.worst_error),
            format!("{:.3}", numbers.mean_ratio),
            format!("{:.1}", report.seconds),
        ];
        row.extend(perplexities.get(i).map(|p| format!("{p:.3}")));
        rows.push(row);
    }
    table::render(&rows)
}
