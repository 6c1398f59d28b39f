//! Weights of the linears at a tap from the Gram matrices of their inputs, on one rank or on all together.

use std::time::Instant;

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, HessianOptions, Mismatch, Problem, Request, Subset};
use gptq_model::{Block, Model};
use gptq_plan::{BranchPlan, Plan, PlannedLinear};
use gptq_ranks::RankShare;

use crate::RunError;
use crate::block_loop::At;
use crate::gram::TapGrams;
use crate::gram_sums::Grams;
use crate::peers::Peers;
use crate::profile::{Clock, Phase};
use crate::row_parts::{self, TapWeights};
use crate::solve_shares::{Brought, InputBatch, batches, bring};
use crate::solved_tap::{SolvedTap, acts};

/// Linears at a tap, after a solve that ranks have shared.
pub(crate) enum SharedSolve<B: Engine> {
    /// All that is known of them, on rank 0.
    Solved(Vec<SolvedTap<B>>),
    /// Their weights, on other ranks.
    Weights(TapWeights<B>),
}

/// Solves the linears that a branch quantizes at a tap, input by input, but for inputs of which it quantizes none.
/// Each rank solves its own linears where matrices go from device to device, else its rows of all of them.
///
/// # Errors
/// A Gram matrix that cannot be factored, or only with more damping than the plan allows.
pub(crate) fn solve<B: Engine>(
    plan: &Plan,
    model: &Model<B>,
    at: At,
    grams: TapGrams<B>,
    block: &Block<B>,
    peers: &Peers<'_, B>,
    clock: &mut Clock,
) -> Result<SharedSolve<B>, RunError> {
    let started = Instant::now();
    let share = peers.share();
    let branch = &plan.branches[at.branch];
    let (mut linears, mut inputs) = (Vec::new(), Vec::new());
    for (input, grams) in (grams.first..).zip(grams.of) {
        let spec = block.spec();
        let planned = |linear| branch.planned(at.layer, linear, &spec.linears()[linear]);
        let of: Vec<_> = spec.linears_at(at.tap, input).filter_map(planned).collect();
        if !of.is_empty() {
            inputs.push(Some(grams));
            linears.push(of);
        }
    }
    let strip = B::STRIP.filter(|_| share.size > 1 && peers.link.is_none());
    let batches = match B::STRIP {
        // Rows do not depend on what is solved beside them: all inputs at once.
        Some(_) if share.size == 1 || strip.is_some() => {
            let owners = linears.iter().map(|of| vec![share.rank; of.len()]);
            vec![InputBatch {
                inputs: 0..linears.len(),
                owners: owners.collect(),
            }]
        }
        _ => batches::<B>(&linears, share.size),
    };
    let mut subsets: Vec<Option<Subset<B>>> = linears.iter().map(|_| None).collect();
    for batch in &batches {
        let (mut own, mut problems) = (Vec::new(), Vec::new());
        for (input, owners) in batch.inputs.clone().zip(&batch.owners) {
            let grams = inputs[input].take().expect("an input is in one batch");
            let of = linears[input].iter().zip(owners);
            let of = of.filter(|(_, owner)| **owner == share.rank);
            let of: Vec<PlannedLinear> = of.map(|(linear, _)| linear.clone()).collect();
            if !of.is_empty() {
                let rows = strip.map(|strip| (share, strip));
                problems.push(problem(branch, model.dtype(), grams, &of, block, rows));
                own.push(input);
            }
        }
        for (input, subset) in own
            .iter()
            .zip(solve_batch(branch, problems, &own, &linears)?)
        {
            if subset.damping > plan.numerics.max_damping {
                return Err(RunError::Damping {
                    branch: branch.name.clone(),
                    modules: modules(&linears[*input]),
                    needed: subset.damping,
                    most: plan.numerics.max_damping,
                });
            }
            subsets[*input] = Some(subset);
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    // Several at the same time: their shares of it, not their sums.
    let sum = |of: &dyn Fn(&Subset<B>) -> f64| subsets.iter().flatten().map(of).sum::<f64>();
    let factor = sum(&|it| it.times.factor);
    let part = factor / (factor + sum(&|it| it.times.sweep)).max(f64::MIN_POSITIVE);
    clock.add(Phase::Factor, seconds * part);
    clock.add(Phase::Sweep, seconds * (1.0 - part));
    let seconds = seconds / linears.len() as f64;
    let solved_taps = |subsets: Vec<Subset<B>>, linears: Vec<Vec<PlannedLinear>>| {
        let taps = linears.into_iter().zip(subsets);
        let taps = taps.map(|(linears, subset)| SolvedTap {
            linears,
            subset,
            seconds,
        });
        taps.collect::<Vec<_>>()
    };
    let place = (model.dtype(), model.device());
    if let Some(link) = peers.link.filter(|_| !linears.is_empty()) {
        let kept = (model.dtype(), branch.method.tune > 0);
        let brought = bring(&linears, &batches, subsets, kept, link, peers)?;
        return Ok(match brought {
            Brought::All(subsets) => SharedSolve::Solved(solved_taps(subsets, linears)),
            Brought::Weights(weights) => SharedSolve::Weights(weights),
        });
    }
    let mut solved = solved_taps(subsets.into_iter().flatten().collect(), linears);
    if let Some(strip) = strip.filter(|_| !solved.is_empty())
        && let Some(weights) = row_parts::join(&mut solved, strip, place, peers.ranks)?
    {
        return Ok(SharedSolve::Weights(weights));
    }
    Ok(SharedSolve::Solved(solved))
}

/// Names of linears, for an error.
fn modules(of: &[PlannedLinear]) -> String {
    let modules = of.iter().map(|linear| linear.module.as_str());
    modules.collect::<Vec<_>>().join(", ")
}

/// Solves problems together, those of the `inputs` in their order.
fn solve_batch<B: Engine>(
    branch: &BranchPlan,
    problems: Vec<Problem<B>>,
    inputs: &[usize],
    linears: &[Vec<PlannedLinear>],
) -> Result<Vec<Subset<B>>, RunError> {
    let hessian = HessianOptions {
        act_order: branch.desc_act,
        damping: branch.damp_percent,
    };
    if problems.is_empty() {
        return Ok(Vec::new());
    }
    B::solve_each(problems, hessian).map_err(|(at, source)| RunError::Solver {
        branch: branch.name.clone(),
        modules: modules(&linears[inputs[at]]),
        source: Box::new(source),
    })
}

/// Returns the linears `linears`, which share an input, as the engine takes them: a rank's share of their strips of so
/// many rows, or all.
fn problem<B: Engine>(
    branch: &BranchPlan,
    dtype: DType,
    grams: Grams<B>,
    linears: &[PlannedLinear],
    block: &Block<B>,
    rows: Option<(RankShare, usize)>,
) -> Problem<B> {
    let strength = branch.method.mismatch_correction;
    let mismatch = grams.mismatch.filter(|_| strength > 0.0);
    let residual = mismatch.as_ref().and_then(|drift| drift.residual.clone());
    let request = |linear: &PlannedLinear| {
        let (n_in, n_out) = linear.shape;
        let rows = rows.map_or(0..n_out, |(share, strip)| share.rows(n_out, strip));
        if rows.is_empty() {
            return None;
        }
        let own = |all: Tensor<B, 2>| match rows.len() == n_out {
            true => all,
            false => all.slice([rows.clone(), 0..n_in]),
        };
        let weight = block.linear(linear.linear).weight.dense(dtype);
        let residual = block.spec().added(linear.linear).and_then(|scale| {
            let residual = residual.clone()? * acts(weight.clone());
            Some(if scale == 1.0 {
                residual
            } else {
                residual / scale
            })
        });
        Some(Request {
            weight: own(weight),
            settings: linear.settings,
            residual: residual.map(own),
            keep_unrounded: branch.method.tune > 0,
        })
    };
    Problem {
        requests: linears.iter().filter_map(request).collect(),
        mismatch: mismatch.map(|drift| Mismatch {
            gram: drift.gram,
            cross: drift.cross,
            strength,
        }),
        gram: grams.all,
    }
}
