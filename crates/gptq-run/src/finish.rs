//! The end of a pass: every branch put in place with its report.

use std::sync::atomic::AtomicBool;

use gptq_calibration::Manifest;
use gptq_plan::{
    BranchFiles, BranchReport, Fingerprint, ModelFiles, PhaseSeconds, Plan, Propagation, SolvedWith,
};

use crate::branch_progress::BranchProgress;
use crate::branch_writer::BranchWriter;
use crate::options::check_stop;
use crate::{Event, RunError};

/// Facts of a report that the blocks do not tell.
pub(crate) struct About<'a> {
    pub(crate) manifest: &'a Manifest,
    pub(crate) device: String,
    /// The branches', in their order.
    pub(crate) prints: Vec<&'a Fingerprint>,
}

/// Writes the branches' reports and gives their directories their names; `branches` are in the plan's order.
///
/// # Errors
/// A disk that fails, or `stop`.
pub(crate) fn finish(
    plan: &Plan,
    branches: impl Iterator<Item = (BranchProgress, BranchWriter)>,
    model_files: &ModelFiles,
    phases: Vec<PhaseSeconds>,
    about: &About<'_>,
    stop: &AtomicBool,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Vec<BranchReport>, RunError> {
    let mut reports = Vec::with_capacity(plan.branches.len());
    for (i, (progress, writer)) in branches.enumerate() {
        check_stop(stop, plan.config.layers)?;
        let branch = &plan.branches[i];
        let mut report = BranchReport {
            gptq_version: env!("CARGO_PKG_VERSION").to_owned(),
            model: plan.model_name.clone(),
            model_files: Some(model_files.clone()),
            branch: branch.name.clone(),
            quantize_config: BranchFiles::of(branch, &plan.config)
                .quantize_config(&plan.model_name),
            solved: Some(SolvedWith {
                act_order: branch.desc_act,
                damp_percent: branch.damp_percent,
            }),
            preset: branch.preset,
            method: Some(branch.method),
            budget: branch.allocation.clone(),
            propagation: match plan.propagation {
                Propagation::Quantized => "quantised".to_owned(),
                Propagation::Dense => "dense".to_owned(),
            },
            calibration: about.manifest.clone(),
            device: about.device.clone(),
            bytes: 0,
            seconds: progress.seconds,
            phases: phases.clone(),
            fingerprint: Some(about.prints[i].clone()),
            recipe: plan.public_recipe.clone(),
            command: plan.command.clone(),
            clamped: progress.clamped,
            perplexity: None,
            compared: Some(plan.share()),
            blocks: progress.blocks,
            linears: progress.linears,
        };
        writer.finish(&mut report)?;
        on_event(Event::Finished {
            branch: i,
            report: &report,
        });
        reports.push(report);
    }
    Ok(reports)
}
