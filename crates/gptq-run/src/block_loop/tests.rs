//! The loop on a model of two small blocks, with strategies that note what they are told.

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use gptq_format::{FormatError, Half, ShardedWriter, TensorSpec, le_bytes, write_json};
use gptq_kernels::{Cpu, Incoming, dtype};
use gptq_plan::{BranchBlock, Places, Recipe};
use gptq_ranks::OneRank;
use half::f16;
use safetensors::Dtype;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::branch_progress::BranchProgress;
use crate::peers::Peers;
use crate::profile::Clock;
use crate::solve::{Solve, SolvedSink};
use crate::states::Embedded;
use crate::stream::Span;

const LAYERS: usize = 2;
const TAPS: usize = 4;

/// A Llama of two blocks, 32 wide, with weights that repeat from run to run.
pub(crate) fn model() -> (TempDir, Model<Cpu>) {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "vocab_size": 16,
    });
    write_json(&dir.path().join("config.json"), &config).unwrap();
    let config = gptq_spec::ModelConfig::from_json(config).unwrap();
    let specs = config.tensors().into_iter().map(|tensor| TensorSpec {
        name: tensor.name,
        dtype: Dtype::F16,
        shape: tensor.shape,
    });
    let specs: Vec<TensorSpec> = specs.collect();
    let writer = ShardedWriter::create(dir.path(), &specs, None).unwrap();
    let mut state = 1_u64;
    for spec in &specs {
        let values: Vec<u16> = (0..spec.bytes() / 2)
            .map(|_| {
                state = (state.wrapping_mul(6_364_136_223_846_793_005)).wrapping_add(1);
                let uniform = (state >> 40) as f32 / 8_388_608.0 - 1.0;
                f16::from_f32(0.3 * uniform).to_bits()
            })
            .collect();
        writer.write(&spec.name, le_bytes(&values)).unwrap();
    }
    writer.finish().unwrap();
    let model = Model::open(dir.path(), &Default::default()).unwrap();
    (dir, model)
}

pub(crate) fn plan(model: &Model<Cpu>, top: &str, branches: &str) -> Plan {
    let text = format!(
        "{top}\n[model]\nsource = \"m\"\n[calibration]\nsource = \"rows.json\"\nsamples = 6\nseq_len = 8\n\
         [output]\ndir = \"out\"\n{branches}"
    );
    let recipe = Recipe::parse("r.toml".as_ref(), text).unwrap();
    Plan::for_config(&recipe, model.config().clone()).unwrap()
}

pub(crate) fn branch(name: &str, keys: &str) -> String {
    format!("[[branch]]\nname = \"{name}\"\nbits = 4\ngroup_size = 32\n{keys}\n")
}

/// Six windows of eight tokens, two in a chunk.
pub(crate) fn states(model: &Model<Cpu>, plan: &Plan) -> States<Cpu> {
    let window = |w: u32| (0..8).map(|t| (5 * w + 3 * t + t * t) % 16).collect();
    let windows: Vec<Vec<u32>> = (0..6).map(window).collect();
    let flows = model.flows(&windows, 2, dtype(Half::F16)).unwrap();
    let span = Span { first: 0, of: 3 };
    States::begin(plan, Embedded { flows, span }, &Places::DEVICE, None, None).unwrap()
}

/// Each branch's residual stream, bit by bit; with dense propagation all branches have one.
fn residuals(states: &States<Cpu>, branch: usize) -> Vec<u16> {
    let own = |stream: &&Stream<Cpu>| stream.branches.contains(&branch);
    let stream = states.streams.iter().find(own).unwrap();
    let chunks = stream.chunks.iter();
    chunks
        .flat_map(|it| it.residual().unwrap().into_owned())
        .collect()
}

/// Multiplies the weights of a branch by a number of its own, and notes what it is told.
#[derive(Default)]
struct Scale {
    solves: bool,
    /// The branch that is tuned, if any: until then its weights are doubled.
    tuned: Option<usize>,
    factors: Vec<f32>,
    told: Vec<String>,
    grams: Vec<(At, f32)>,
}

impl Strategy<Cpu> for Scale {
    fn solves(&self) -> bool {
        self.solves
    }

    fn tap(
        &mut self,
        at: At,
        grams: Option<TapGrams<Cpu>>,
        _compared: Option<&OutputErrors<Cpu>>,
        block: &mut Block<Cpu>,
        _clock: &mut Clock,
    ) -> Result<(), RunError> {
        self.told
            .push(format!("{}{}{}", at.layer, at.branch, at.tap));
        let factor = match &grams {
            Some(_) if self.tuned == Some(at.branch) => 2.0,
            _ => self.factors[at.branch],
        };
        if let Some(grams) = grams {
            self.grams
                .push((at, grams.of[0].all.clone().sum().into_scalar()));
        }
        for linear in block.spec().clone().linears_of(at.tap) {
            let weight: Tensor<Cpu, 2> = block.linear(linear).weight.dense(dtype(Half::F16));
            block.set_weight(linear, weight.mul_scalar(factor));
        }
        Ok(())
    }

    fn tunes(&self, branch: usize) -> bool {
        self.tuned == Some(branch)
    }

    fn tune(
        &mut self,
        layer: usize,
        branch: usize,
        [dense, quantized]: [&Block<Cpu>; 2],
        start: &Stream<Cpu>,
        _dense: &Dense<Cpu>,
        _clock: &mut Clock,
    ) -> Result<(), RunError> {
        assert_eq!(start.branches, [branch]);
        let sum = |block: &Block<Cpu>| -> f32 {
            let weight = block.linear(0).weight.dense(dtype(Half::F16));
            weight.cast(burn::tensor::DType::F32).sum().into_scalar()
        };
        assert!((sum(quantized) / sum(dense) - 2.0).abs() < 1e-2);
        self.told.push(format!("{layer}{branch} is tuned"));
        Ok(())
    }

    fn branch_end(
        &mut self,
        layer: usize,
        branch: usize,
        _compared: Option<&OutputErrors<Cpu>>,
    ) -> Result<(), RunError> {
        self.told.push(format!("{layer}{branch} ends"));
        Ok(())
    }
}

/// Takes `states` through all blocks.
pub(crate) fn run(
    model: &Model<Cpu>,
    plan: &Plan,
    states: &mut States<Cpu>,
    strategy: &mut dyn Strategy<Cpu>,
    check: &mut dyn FnMut() -> Result<(), RunError>,
) -> Result<(), RunError> {
    let mut clock = Clock::new(false);
    let mut pass = BlockLoop {
        plan,
        model,
        peers: Peers::by_messages(&OneRank),
        clock: &mut clock,
        frugal: false,
        gram_bytes: u64::MAX,
        check,
    };
    for layer in 0..LAYERS {
        let block = model.block(layer).unwrap();
        pass.block(layer, &block, states, strategy)?;
        let source = format!("block {layer}");
        strategy.block_end(layer, source, states, pass.clock)?;
    }
    Ok(())
}

fn scaled(model: &Model<Cpu>, plan: &Plan, factors: &[f32], solves: bool) -> (Scale, States<Cpu>) {
    let mut states = states(model, plan);
    let mut strategy = Scale {
        solves,
        factors: factors.into(),
        ..Scale::default()
    };
    run(model, plan, &mut states, &mut strategy, &mut || Ok(())).unwrap();
    (strategy, states)
}

#[test]
fn branches_go_depth_first_and_part_at_the_first_tap() {
    let (_dir, model) = model();
    let both = plan(&model, "", &(branch("a", "") + &branch("b", "")));
    let (strategy, states) = scaled(&model, &both, &[0.9, 1.1], true);
    let expected = [
        "000", "001", "002", "003", "00 ends", "010", "011", "012", "013", "01 ends", "100", "101",
        "102", "103", "10 ends", "110", "111", "112", "113", "11 ends",
    ];
    assert_eq!(strategy.told, expected);
    let streams = states.streams.iter().map(|stream| stream.branches.clone());
    assert_eq!(streams.collect::<Vec<_>>(), [[0], [1]]);
    // Both have the model's first input, and nothing else in common.
    let gram = |layer, branch, tap| {
        let at = At { layer, branch, tap };
        strategy.grams.iter().find(|(it, _)| *it == at).unwrap().1
    };
    assert_eq!(gram(0, 0, 0), gram(0, 1, 0));
    for (layer, tap) in [(0, 1), (0, 3), (1, 0), (1, 2)] {
        assert_ne!(gram(layer, 0, tap), gram(layer, 1, tap));
    }
    // What a branch comes to does not depend on the others.
    let alone = plan(&model, "", &branch("b", ""));
    let (_, own) = scaled(&model, &alone, &[1.1], true);
    assert!(residuals(&states, 1) == residuals(&own, 0));
    assert!(residuals(&states, 0) != residuals(&own, 0));
}

#[test]
fn with_dense_propagation_all_branches_stay_on_the_dense_models_states() {
    let (_dir, model) = model();
    let both = branch("a", "") + &branch("b", "");
    let both = plan(&model, "propagate = \"dense\"", &both);
    let (strategy, states) = scaled(&model, &both, &[0.9, 1.1], true);
    assert_eq!(strategy.told[..4], ["000", "010", "001", "011"]);
    assert_eq!(strategy.grams.len(), 2 * TAPS * LAYERS);
    let [a, b] = [0, 1].map(|branch| {
        let own = strategy.grams.iter().filter(|(at, _)| at.branch == branch);
        own.map(|&(_, sum)| sum).collect::<Vec<_>>()
    });
    assert_eq!(a, b);
    assert_eq!(states.streams.len(), 1);
    let alone = plan(&model, "", &branch("a", ""));
    let (_, dense) = scaled(&model, &alone, &[1.0], true);
    assert!(residuals(&states, 0) == residuals(&dense, 0));
}

#[test]
fn known_weights_need_no_gram_matrices_and_give_the_same_states() {
    let (_dir, model) = model();
    let both = plan(&model, "", &(branch("a", "") + &branch("b", "")));
    let (solved, first) = scaled(&model, &both, &[0.9, 1.1], true);
    let (replayed, again) = scaled(&model, &both, &[0.9, 1.1], false);
    assert_eq!(solved.told, replayed.told);
    assert_eq!(solved.grams.len(), 2 * TAPS * LAYERS);
    assert!(replayed.grams.is_empty());
    for branch in [0, 1] {
        assert!(residuals(&first, branch) == residuals(&again, branch));
    }
}

#[test]
fn without_true_sequential_a_block_is_solved_from_its_dense_inputs() {
    let (_dir, model) = model();
    let keys = "true_sequential = false";
    let (at_once, _) = scaled(&model, &plan(&model, "", &branch("a", keys)), &[0.5], true);
    let (dense, _) = scaled(&model, &plan(&model, "", &branch("a", "")), &[1.0], true);
    let (tap_by_tap, _) = scaled(&model, &plan(&model, "", &branch("a", "")), &[0.5], true);
    assert_eq!(at_once.told, tap_by_tap.told);
    // Between taps that are solved together states are not rounded to 16 bits: 2^-11 of them at most.
    let near = |a: &Scale, b: &Scale| {
        let pairs = a.grams.iter().zip(&b.grams).take(TAPS);
        pairs
            .map(|(a, b)| (a.1 - b.1).abs() <= 2e-3 * a.1.abs())
            .collect::<Vec<_>>()
    };
    assert_eq!(near(&at_once, &dense), [true; TAPS]);
    assert_eq!(near(&at_once, &tap_by_tap)[..2], [true, false]);
    // Beside a branch that is sequential it has a stream of its own from the start.
    let mixed = branch("a", keys) + &branch("b", "");
    let (mixed, _) = scaled(&model, &plan(&model, "", &mixed), &[0.5, 0.5], true);
    let order = [
        "010", "011", "012", "013", "01 ends", "000", "001", "002", "003", "00 ends",
    ];
    assert_eq!(mixed.told[..10], order);
}

#[test]
fn a_branch_that_is_tuned_goes_through_the_block_again_from_its_start() {
    let (_dir, model) = model();
    let both = plan(&model, "", &(branch("a", "tune = 1") + &branch("b", "")));
    let mut states = states(&model, &both);
    let mut strategy = Scale {
        solves: true,
        tuned: Some(0),
        factors: vec![0.9, 1.1],
        ..Scale::default()
    };
    run(&model, &both, &mut states, &mut strategy, &mut || Ok(())).unwrap();
    let expected = [
        "000",
        "001",
        "002",
        "003",
        "00 is tuned",
        "000",
        "001",
        "002",
        "003",
        "00 ends",
        "010",
    ];
    assert_eq!(strategy.told[..11], expected);
    // As if it had had its last weights from the start; and the other branch does not notice.
    let (_, plain) = scaled(&model, &both, &[0.9, 1.1], true);
    for branch in [0, 1] {
        assert!(residuals(&states, branch) == residuals(&plain, branch));
    }
}

#[test]
fn a_check_that_fails_ends_the_loop_before_the_next_tap() {
    let (_dir, model) = model();
    let plan = plan(&model, "", &branch("a", ""));
    let mut states = states(&model, &plan);
    let mut strategy = Scale {
        solves: true,
        factors: vec![1.0],
        ..Scale::default()
    };
    let mut left = 5;
    let mut check = || match left {
        0 => Err(RunError::Stopped {
            done: 0,
            layers: LAYERS,
        }),
        _ => {
            left -= 1;
            Ok(())
        }
    };
    let ended = run(&model, &plan, &mut states, &mut strategy, &mut check);
    assert!(matches!(ended, Err(RunError::Stopped { .. })));
    // It is asked before a tap's Gram matrix and before it is solved.
    assert_eq!(strategy.told, ["000", "001"]);
}

/// Notes what it takes.
#[derive(Default)]
struct Notes(Vec<String>);

impl SolvedSink for Notes {
    fn linear(
        &mut self,
        branch: usize,
        module: String,
        packed: Incoming,
    ) -> Result<(), FormatError> {
        let packed = packed.wait();
        assert!(!packed.codes.is_empty(), "{module}");
        self.0.push(format!("{branch} {module}"));
        Ok(())
    }

    fn block(
        &mut self,
        layer: usize,
        source: String,
        branches: Vec<BranchBlock>,
        states: Option<String>,
    ) -> Result<(), FormatError> {
        let linears: Vec<usize> = branches.iter().map(|it| it.linears.len()).collect();
        assert!(branches.iter().all(|it| it.check(layer).is_ok()));
        assert_eq!(states, None);
        self.0.push(format!("{layer} of {source}: {linears:?}"));
        Ok(())
    }
}

#[test]
fn every_linear_is_written_before_the_record_of_its_block() {
    let (_dir, model) = model();
    let skip = "[[branch.override]]\nmatch = \"*.k_proj\"\nskip = true";
    let plan = plan(&model, "", &(branch("a", "") + &branch("b", skip)));
    let mut states = states(&model, &plan);
    let mut progress = vec![BranchProgress::default(); 2];
    let mut sink = Notes::default();
    let mut events = 0;
    let mut solve = Solve {
        plan: &plan,
        model: &model,
        sink: Some(&mut sink),
        peers: Peers::by_messages(&OneRank),
        progress: &mut progress,
        save_every: Duration::MAX,
        last_saved: Instant::now(),
        stop: &AtomicBool::new(false),
        on_event: &mut |_| events += 1,
        waiting: Default::default(),
        tuning: None,
    };
    run(&model, &plan, &mut states, &mut solve, &mut || Ok(())).unwrap();
    let names = ["q", "k", "v", "o", "gate", "up", "down"].map(|it| format!("{it}_proj"));
    let modules = |branch: usize, layer: usize| {
        let names = names
            .iter()
            .filter(move |it| branch == 0 || *it != "k_proj");
        names.map(move |name| {
            let part = if ["gate_proj", "up_proj", "down_proj"].contains(&&**name) {
                "mlp"
            } else {
                "self_attn"
            };
            format!("{branch} model.layers.{layer}.{part}.{name}")
        })
    };
    let block = |layer: usize| {
        let record = format!("{layer} of block {layer}: [7, 6]");
        modules(0, layer).chain(modules(1, layer)).chain([record])
    };
    let expected: Vec<String> = (0..LAYERS).flat_map(block).collect();
    assert_eq!(sink.0, expected);
    assert_eq!(events, LAYERS * (7 + 6));
    let reports = progress
        .iter()
        .map(|it| it.linears.len())
        .collect::<Vec<_>>();
    assert_eq!(reports, [14, 12]);
    assert!(progress.iter().all(|it| it.seconds > 0.0));
}

/// A range of taps that was clamped behind.
#[derive(Default)]
struct Clamps(Vec<(usize, Range<usize>, Vec<usize>, usize)>);

impl Strategy<Cpu> for Clamps {
    fn solves(&self) -> bool {
        false
    }

    fn tap(
        &mut self,
        at: At,
        _grams: Option<TapGrams<Cpu>>,
        _compared: Option<&OutputErrors<Cpu>>,
        block: &mut Block<Cpu>,
        _clock: &mut Clock,
    ) -> Result<(), RunError> {
        // What gate and up of the first block give is beyond f16 once it is multiplied.
        if (at.layer, at.tap) == (0, 2) {
            for linear in block.spec().clone().linears_of(at.tap) {
                let weight: Tensor<Cpu, 2> = block.linear(linear).weight.dense(dtype(Half::F16));
                block.set_weight(linear, weight.mul_scalar(3000.0));
            }
        }
        Ok(())
    }

    fn clamped(&mut self, layer: usize, taps: Range<usize>, branches: &[usize], values: usize) {
        self.0.push((layer, taps, branches.into(), values));
    }
}

#[test]
fn clamped_values_are_told_with_their_place() {
    let (_dir, model) = model();
    let clamp = "[numerics]\noverflow = \"clamp\"\n";
    let plan = plan(&model, "", &(clamp.to_owned() + &branch("a", "")));
    let mut states = states(&model, &plan);
    let mut clamps = Clamps::default();
    run(&model, &plan, &mut states, &mut clamps, &mut || Ok(())).unwrap();
    let (layer, taps, branches, values) = &clamps.0[0];
    assert_eq!((*layer, taps.clone(), &branches[..]), (0, 2..3, &[0][..]));
    assert!(*values > 0);
}
