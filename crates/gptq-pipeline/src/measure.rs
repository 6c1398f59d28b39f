//! Finding how to spend size budgets: a pass over the model before the branches' own.
//!
//! Every choice of every budget is a branch of a run that writes nothing and propagates the dense
//! model's hidden states, so that all of them share one forward and one Gram matrix for each tap. What
//! a choice costs the linears of a tap is how far the block's output moves where they alone have it
//! ([`Stream::moved`](crate::stream::Stream)): on medi-24m this foretells what the choice does to the
//! whole model's predictions, and the relative error of the linears does not (`crates/README.md`).

use std::collections::BTreeMap;
use std::thread::scope;
use std::time::{Duration, Instant};

use gptq_kernels::{Engine, dtype};

use crate::branch_plan::ModuleOverride;
use crate::journal::Recorded;
use crate::memory::{Places, chunk_windows};
use crate::model_files::ModelHash;
use crate::quantize::{Inputs, Quantize};
use crate::read_ahead::read_ahead;
use crate::resume::Restored;
use crate::run::{Output, Run};
use crate::{
    BranchPlan, Budget, Choice, Event, Numerics, PipelineError, Plan, Propagation, disk_space,
};

/// Of how many windows one is measured on, if that leaves [`LEAST`].
const SHARE: usize = 4;
/// Windows.
const LEAST: usize = 8;

impl Quantize<'_> {
    /// Spends the budgets of `plan`, the branches with index `branches`: as `recorded` says, or else by
    /// measuring.
    pub(crate) fn settle<B: Engine>(
        &mut self,
        inputs: &Inputs<B>,
        model_hash: &mut ModelHash,
        plan: &mut Plan,
        branches: &[usize],
        recorded: Option<&Recorded>,
    ) -> Result<(), PipelineError> {
        if !plan.branches.iter().any(BranchPlan::is_open) {
            return Ok(());
        }
        let settled = match recorded {
            Some(recorded) => restored(plan, recorded)?,
            None => {
                // Before there is work to lose.
                disk_space::check(plan, self.options.scratch, inputs.places.disk_bytes)?;
                self.measured(inputs, model_hash, plan)?
            }
        };
        plan.branches = settled;
        for (branch, &index) in plan.branches.iter().zip(branches) {
            if let Some(allocation) = &branch.allocation {
                (self.on_event)(Event::Allocated {
                    branch: index,
                    allocation,
                });
            }
        }
        Ok(())
    }

    fn measured<B: Engine>(
        &mut self,
        inputs: &Inputs<B>,
        model_hash: &mut ModelHash,
        plan: &Plan,
    ) -> Result<Vec<BranchPlan>, PipelineError> {
        let windows = &inputs.calibration.windows;
        let step = (windows.len() / LEAST).clamp(1, SHARE);
        let windows: Vec<Vec<u32>> = windows.iter().step_by(step).cloned().collect();
        let probes = probes(plan, windows.len());
        let model = &inputs.model;
        let shared = B::free_memory(model.device()).is_none();
        let places = Places::new::<B>(&probes, *self.budget, self.options.host_memory, shared)?;
        let scratch = self.scratch(plan, &places)?;
        let on_event = &mut *self.on_event;
        let outputs = scope(|scope| {
            let blocks = read_ahead(scope, model, 0);
            let flows = model.flows(
                &windows,
                chunk_windows::<B>(plan.calibration.seq_len),
                dtype(B::kept(plan.half)),
            )?;
            let restored = Restored::none(&probes);
            let run = Run {
                plan: &probes,
                model,
                model_hash,
                writer: None,
                outputs: restored.outputs(),
                restored,
                partials: Vec::new(),
                clock: &mut self.clock,
                frugal: self.options.device_memory.is_some(),
                stop: self.options.stop,
                keep_every: Duration::MAX,
                last_kept: Instant::now(),
                on_event: &mut |event| {
                    if let Event::Measured { .. } = event {
                        on_event(event);
                    }
                },
            };
            run.measure(flows, &places, scratch.as_ref(), &blocks)
        })?;
        let spent = plan.branches.iter().map(|branch| match &branch.budget {
            Some(budget) => spend(plan, branch, budget, &probes, &outputs),
            None => branch.clone(),
        });
        Ok(spent.collect())
    }
}

/// As an earlier run spent them.
fn restored(plan: &Plan, recorded: &Recorded) -> Result<Vec<BranchPlan>, PipelineError> {
    let settled = |branch: &BranchPlan| {
        if !branch.is_open() {
            return Ok(branch.clone());
        }
        let allocation = recorded.header.allocations.get(&branch.name);
        let settled = allocation.and_then(|it| branch.settled(it, &plan.config));
        settled.ok_or_else(|| PipelineError::Journal {
            path: plan.output.clone(),
            reason: format!(
                "it does not say how the budget of branch {} is spent",
                branch.name
            ),
        })
    };
    plan.branches.iter().map(settled).collect()
}

fn spend(
    plan: &Plan,
    branch: &BranchPlan,
    budget: &Budget,
    probes: &Plan,
    outputs: &[Output],
) -> BranchPlan {
    let own = |choice: &Choice| {
        let probe = probe(plan, branch, *choice);
        let at = probes.branches.iter().position(|it| *it == probe);
        &outputs[at.expect("every choice has its probe")].moved
    };
    let measured: Vec<&BTreeMap<(usize, usize), f64>> = budget.choices.iter().map(own).collect();
    let open = branch.open_groups(&plan.config);
    let losses = open.iter().map(|group| {
        let at = (group.layer, group.tap);
        measured.iter().map(|moved| moved[&at]).collect()
    });
    let losses: Vec<Vec<f64>> = losses.collect();
    let allocation = branch.spend(budget, &losses, &plan.config);
    let settled = branch.settled(&allocation, &plan.config);
    settled.expect("an allocation of its own")
}

/// A run whose branches are the choices of the budgets in `plan`, each once.
fn probes(plan: &Plan, windows: usize) -> Plan {
    let mut branches: Vec<BranchPlan> = Vec::new();
    for branch in &plan.branches {
        for choice in branch.budget.iter().flat_map(|budget| &budget.choices) {
            let probe = probe(plan, branch, *choice);
            if !branches.contains(&probe) {
                branches.push(probe);
            }
        }
    }
    let mut probes = Plan {
        branches,
        propagation: Propagation::Dense,
        numerics: Numerics {
            // Fewer windows may need more of it than the branches will.
            max_damping: f64::INFINITY,
            ..plan.numerics
        },
        ..plan.clone()
    };
    probes.calibration.samples = windows;
    probes
}

/// `branch` with `choice` wherever it may have it, by the plain method.
fn probe(plan: &Plan, branch: &BranchPlan, choice: Choice) -> BranchPlan {
    let left_out = |pattern: String| ModuleOverride {
        pattern,
        settings: None,
    };
    let overrides = branch.overrides.iter().map(|own| own.pattern.clone());
    let blocks = plan.config.blocks().iter().enumerate();
    let unfit = blocks.flat_map(|(layer, block)| {
        let linears = block.linears().iter();
        let unfit = linears.filter(|linear| !choice.group_size.divides(linear.in_features));
        unfit.map(move |linear| linear.module(layer))
    });
    BranchPlan {
        name: String::new(),
        bits: choice.bits,
        group_size: choice.group_size,
        true_sequential: true,
        method: crate::Method {
            refine: 0,
            asymmetric: 0.0,
            ..branch.method
        },
        budget: None,
        overrides: overrides.chain(unfit).map(left_out).collect(),
        ..branch.clone()
    }
}
