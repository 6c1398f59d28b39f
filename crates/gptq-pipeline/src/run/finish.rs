//! The end of a run: every branch put in place with its report.

use std::time::Instant;

use gptq_calibration::Manifest;
use gptq_kernels::Engine;

use super::Run;
use crate::profile::Phase;
use crate::quantize::{Event, check_stop};
use crate::{BranchReport, Fingerprint, PipelineError, Propagation, Solved};

/// What a report says beside the run's own numbers.
pub(crate) struct About<'a> {
    pub(crate) manifest: &'a Manifest,
    pub(crate) device: String,
    /// The branches', in their order.
    pub(crate) prints: Vec<&'a Fingerprint>,
}

impl<B: Engine> Run<'_, '_, B> {
    pub(super) fn finish(self, about: About<'_>) -> Result<Vec<BranchReport>, PipelineError> {
        let plan = self.plan;
        let started = Instant::now();
        let writers = match self.writer {
            Some(writer) => writer.finish()?,
            None => Vec::new(),
        };
        let model_files = self.model_hash.wait(self.stop, plan.config.layers)?;
        let mut reports = Vec::with_capacity(plan.branches.len());
        let outputs = plan.branches.iter().zip(self.outputs).zip(writers);
        for (i, ((branch, output), writer)) in outputs.enumerate() {
            check_stop(self.stop, plan.config.layers)?;
            let mut report = BranchReport {
                gptq_version: env!("CARGO_PKG_VERSION").to_owned(),
                model: plan.model_name.clone(),
                model_files: Some(model_files.clone()),
                branch: branch.name.clone(),
                quantize_config: branch.quantize_config(&plan.model_name, &plan.config),
                solved: Some(Solved {
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
                seconds: output.seconds,
                phases: self.clock.profile().phases(),
                fingerprint: Some(about.prints[i].clone()),
                recipe: plan.public_recipe.clone(),
                command: plan.command.clone(),
                clamped: output.clamped,
                perplexity: None,
                compared: Some(plan.share()),
                blocks: output.blocks,
                linears: output.linears,
            };
            writer.finish(&mut report)?;
            (self.on_event)(Event::Finished {
                branch: i,
                report: &report,
            });
            reports.push(report);
        }
        self.clock
            .add(Phase::Write, started.elapsed().as_secs_f64());
        Ok(reports)
    }
}
