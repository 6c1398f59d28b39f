//! Tuned branches of a model of two small blocks.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use gptq_format::{Half, PackedLinear};
use gptq_kernels::{Cpu, Incoming, dtype};
use gptq_model::Model;
use gptq_plan::{BranchBlock, Places, Plan, SHARE, TuningLoss};
use gptq_ranks::OneRank;

use super::*;
use crate::block_loop::tests::{model, plan, run};
use crate::branch_progress::BranchProgress;
use crate::peers::Peers;
use crate::solve::{Solve, SolvedSink};
use crate::states::{Embedded, States};
use crate::stream::Span;

/// Keeps what it takes.
#[derive(Default)]
struct Written {
    linears: Vec<(String, PackedLinear)>,
    blocks: Vec<BranchBlock>,
}

impl SolvedSink for Written {
    fn linear(
        &mut self,
        _branch: usize,
        module: String,
        packed: Incoming,
    ) -> Result<(), FormatError> {
        self.linears.push((module, packed.wait()));
        Ok(())
    }

    fn block(
        &mut self,
        layer: usize,
        _source: String,
        branches: Vec<BranchBlock>,
        _states: Option<String>,
    ) -> Result<(), FormatError> {
        for block in branches {
            block.check(layer).unwrap();
            self.blocks.push(block);
        }
        Ok(())
    }
}

/// Solves a plan of one branch on 24 windows of eight tokens; the last block's states are those after `reach`.
fn solved(model: &Model<Cpu>, plan: &Plan) -> (Written, BranchProgress) {
    let window = |w: u32| {
        (0..8)
            .map(|t| (5 * w + 3 * t + t * t + w * t) % 16)
            .collect()
    };
    let windows: Vec<Vec<u32>> = (0..24).map(window).collect();
    let flows = model.flows(&windows, 4, dtype(Half::F16)).unwrap();
    let device = model.device();
    let embedded = Embedded {
        flows,
        span: Span { first: 0, of: 6 },
    };
    let sample = |all: &Stream<Cpu>| -> Result<Stream<Cpu>, RunError> {
        Ok(all.sample(SHARE, plan.share().tokens, device)?)
    };
    let mut states = States::begin(plan, embedded, &Places::DEVICE, None, Some(&sample)).unwrap();
    let mut progress = vec![BranchProgress::default()];
    let mut kept = Written::default();
    let mut solve = Solve {
        plan,
        model,
        sink: Some(&mut kept),
        peers: Peers::by_messages(&OneRank),
        progress: &mut progress,
        save_every: Duration::MAX,
        last_saved: Instant::now(),
        stop: &AtomicBool::new(false),
        on_event: &mut |_| (),
        waiting: Default::default(),
        tuning: None,
    };
    run(model, plan, &mut states, &mut solve, &mut || Ok(())).unwrap();
    (kept, progress.remove(0))
}

/// A branch of 2 bits.
fn branch(keys: &str) -> String {
    format!("[[branch]]\nname = \"a\"\nbits = 2\ngroup_size = 32\n{keys}\n")
}

fn of(keys: &str) -> (Written, BranchProgress) {
    let (_dir, model) = model();
    solved(
        &model,
        &plan(&model, "", &branch(&format!("{keys}\npreset = \"tuned\""))),
    )
}

#[test]
fn no_steps_give_the_codes_of_best() {
    let (none, progress) = of("tune = 0");
    let (_dir, model) = model();
    let (best, _) = solved(&model, &plan(&model, "", &branch("preset = \"best\"")));
    assert!(none.linears == best.linears);
    assert!(progress.blocks.iter().all(|block| block.tuning.is_none()));
}

#[test]
fn a_tuned_block_is_never_further_from_the_dense_one_and_its_reports_are_of_what_was_written() {
    let (best, before) = of("tune = 0");
    let (tuned, progress) = of("tune = 100");
    let names = |kept: &Written| {
        kept.linears
            .iter()
            .map(|it| it.0.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&tuned), names(&best));
    for block in &progress.blocks {
        let tuning = block.tuning.as_ref().unwrap();
        assert!(tuning.after <= tuning.before, "{tuning:?}");
        // At most 64 points.
        assert_eq!(tuning.curve.len(), 50);
        let last = block.layer == 1;
        assert_eq!(tuning.loss == TuningLoss::Predictions, last);
    }
    // The solver's objective is that of linears as they were solved.
    for linear in &progress.linears {
        let tuning = progress.blocks[linear.layer].tuning.as_ref().unwrap();
        let closer = tuning.after < tuning.before;
        assert_eq!(linear.solver_objective.is_none(), closer, "{}", linear.name);
        assert!(closer || before.linears.iter().any(|it| it.name == linear.name));
    }
    // The journal's records have all of it, once.
    assert_eq!(tuned.blocks.len(), 2);
    for (recorded, block) in tuned.blocks.iter().zip(&progress.blocks) {
        assert_eq!(recorded.tuning, block.tuning);
        assert_eq!(recorded.linears.len(), 7);
    }
    // Again, the same bytes.
    assert!(of("tune = 100").0.linears == tuned.linears);
}

#[test]
fn tuning_comes_closer_to_the_dense_blocks_where_the_solver_left_much_to_gain() {
    let (_dir, model) = model();
    // Scales that span their groups, and no correction.
    let plain = branch("preset = \"autogptq\"\ntune = 100");
    let (_, progress) = solved(&model, &plan(&model, "", &plain));
    for block in &progress.blocks {
        let tuning = block.tuning.as_ref().unwrap();
        assert!(tuning.after < 0.9 * tuning.before, "{tuning:?}");
    }
}

#[test]
fn every_window_comes_once_before_any_comes_again() {
    let mut batches = Batches::new(10, 4);
    let mut seen = [0; 10];
    for _ in 0..5 {
        batches.next().into_iter().for_each(|at| seen[at] += 1);
    }
    assert_eq!(seen, [2; 10]);
}

#[test]
fn rates_rise_and_fall() {
    let factors: Vec<f32> = (0..100).map(|at| schedule(at, 100)).collect();
    assert!((factors[0] - 0.1).abs() < 1e-6);
    assert!(factors[..10].is_sorted());
    assert!(factors[9..].is_sorted_by(|a, b| a >= b));
    assert!(factors[9] > 0.9 && factors[99] < 0.02);
    assert_eq!(schedule(0, 1), 1.0);
}
