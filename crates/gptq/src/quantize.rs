//! `gptq quantize`.

use anyhow::Result;
use gptq_pipeline::{BranchReport, Plan, quantise};
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
    let reports = quantise(&plan, args.device, &mut |event| progress.show(event))?;

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
    Ok(())
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
