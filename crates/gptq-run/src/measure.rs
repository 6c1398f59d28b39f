//! Finding how to spend size budgets: a pass over the model before the branches' own.
//!
//! Every choice of every budget is a branch of a run that writes nothing and propagates the dense
//! model's hidden states, so that all of them share one forward and one Gram matrix for each tap. What
//! a choice costs the linears of a tap is how far the block's output moves where they alone have it
//! ([`moved`](crate::moved::moved)): on medi-24m this foretells what the choice does to the
//! whole model's predictions, and the relative error of the linears does not (`crates/README.md`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::scope;

use gptq_kernels::Engine;
use gptq_model::Model;
use gptq_plan::{
    Allocation, BranchPlan, Budget, Choice, Method, ModuleOverride, Numerics, Places, Plan,
    PlanError, Propagation, apply_allocation, open_groups, spend_budget,
};

use crate::block_loop::BlockLoop;
use crate::peers::Peers;
use crate::probe::Probe;
use crate::profile::Clock;
use crate::read_ahead::read_ahead;
use crate::scratch::Scratch;
use crate::states::{States, embed};
use crate::{Event, RunError};

/// Probes use every `SHARE`-th window, or more of them if that leaves fewer than [`LEAST`].
const SHARE: usize = 4;
/// Minimum number of windows for probes, if there are as many.
const LEAST: usize = 8;

/// A pass of probes over the blocks.
pub(crate) struct Measuring<'a, B: Engine> {
    pub(crate) model: &'a Model<B>,
    pub(crate) peers: Peers<'a, B>,
    pub(crate) clock: &'a mut Clock,
    pub(crate) frugal: bool,
    pub(crate) check: &'a mut dyn FnMut() -> Result<(), RunError>,
    pub(crate) on_event: &'a mut dyn FnMut(Event<'_>),
}

impl<B: Engine> Measuring<'_, B> {
    /// The branches of `plan` with their budgets spent by how the [`probes`] do on `windows`.
    ///
    /// # Errors
    /// Those of the blocks and the device.
    pub(crate) fn spend(
        self,
        plan: &Plan,
        probes: &Plan,
        windows: &[Vec<u32>],
        places: &Places,
        scratch: Option<&Arc<Scratch>>,
    ) -> Result<Vec<BranchPlan>, RunError> {
        let model = self.model;
        let mut probe = Probe {
            plan: probes,
            model,
            peers: self.peers,
            moved: vec![BTreeMap::new(); probes.branches.len()],
            on_event: self.on_event,
        };
        scope(|scope| {
            let blocks = read_ahead(scope, model, 0);
            let embedded = embed(model, windows, plan.calibration.seq_len, self.peers.ranks)?;
            let mut states = States::begin(probes, embedded, places, scratch, None)?;
            self.clock.add_start();
            let mut pass = BlockLoop {
                plan: probes,
                model,
                peers: self.peers,
                clock: self.clock,
                frugal: self.frugal,
                gram_bytes: places.gram_bytes,
                check: self.check,
            };
            pass.run(0..plan.config.layers, &mut states, &blocks, &mut probe)
        })?;
        let spent = plan.branches.iter().map(|branch| match &branch.budget {
            Some(budget) => spend(plan, branch, budget, probes, &probe.moved),
            None => branch.clone(),
        });
        Ok(spent.collect())
    }
}

/// The windows that probes are measured on.
pub(crate) fn windows(all: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let step = (all.len() / LEAST).clamp(1, SHARE);
    all.iter().step_by(step).cloned().collect()
}

/// The branches of `plan` with their budgets spent as an interrupted run did.
///
/// # Errors
/// Its journal does not say how.
pub(crate) fn recorded(
    plan: &Plan,
    allocations: &BTreeMap<String, Allocation>,
) -> Result<Vec<BranchPlan>, RunError> {
    let settled = |branch: &BranchPlan| {
        if !branch.is_open() {
            return Ok(branch.clone());
        }
        let allocation = allocations.get(&branch.name);
        let settled = allocation.and_then(|it| apply_allocation(branch, it, &plan.config));
        settled.ok_or_else(|| {
            let path = plan.output.clone();
            let reason = format!(
                "it does not say how the budget of branch {} is spent",
                branch.name
            );
            PlanError::Journal { path, reason }.into()
        })
    };
    plan.branches.iter().map(settled).collect()
}

fn spend(
    plan: &Plan,
    branch: &BranchPlan,
    budget: &Budget,
    probes: &Plan,
    moved: &[BTreeMap<(usize, usize), f64>],
) -> BranchPlan {
    let own = |choice: &Choice| {
        let probe = probe(plan, branch, *choice);
        let at = probes.branches.iter().position(|it| *it == probe);
        &moved[at.expect("every choice has its probe")]
    };
    let measured: Vec<&BTreeMap<(usize, usize), f64>> = budget.choices.iter().map(own).collect();
    let open = open_groups(branch, &plan.config);
    let losses = open.iter().map(|group| {
        // Of several taps, as if what one does were nothing to the others.
        let of = |moved: &&BTreeMap<(usize, usize), f64>| {
            let taps = group.taps.clone();
            taps.map(|tap| moved[&(group.layer, tap)]).sum()
        };
        measured.iter().map(of).collect()
    });
    let losses: Vec<Vec<f64>> = losses.collect();
    let allocation = spend_budget(branch, budget, &losses, &plan.config);
    let settled = apply_allocation(branch, &allocation, &plan.config);
    settled.expect("an allocation of its own")
}

/// A run whose branches are the choices of the budgets in `plan`, each once.
pub(crate) fn probes(plan: &Plan, windows: usize) -> Plan {
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
        method: Method {
            refine: 0,
            mismatch_correction: 0.0,
            tune: 0,
            ..branch.method
        },
        budget: None,
        overrides: overrides.chain(unfit).map(left_out).collect(),
        ..branch.clone()
    }
}
