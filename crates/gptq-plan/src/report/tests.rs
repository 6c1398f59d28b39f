//! Reports and journals of the largest models are read again.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use gptq_format::{Bits, GroupSize, TensorDigests};
use gptq_solver::Gains;

use super::*;
use crate::limits::{LINEAR, check_plan};
use crate::{
    BranchBlock, Fingerprint, FinishedBlock, Header, JOURNAL, Origin, RecipeOverrides, RecordedRun,
    journal_line,
};

/// A linear with `number` for each of its errors.
fn linear(layer: usize, name: String, number: f64) -> LinearReport {
    let digest = "0".repeat(64);
    let digests = ["qweight", "qzeros", "scales", "g_idx"].map(|suffix| (suffix, &digest));
    let digests = serde_json::to_value(BTreeMap::from(digests)).unwrap();
    LinearReport {
        layer,
        name,
        shape: [1 << 24, 1 << 24],
        bits: Bits::Four,
        group_size: GroupSize::Columns(1 << 24),
        relative_error: number,
        rtn_error: number,
        ratio: number,
        gains: Gains {
            scale_search: Some(number),
            mismatch_correction: Some(number),
            refine: Some(number),
        },
        output_error: Some(number),
        rtn_output_error: Some(number),
        solver_objective: Some(number),
        damp_percent: number,
        dead_columns: 1 << 24,
        seconds: number.abs(),
        digests: Some(serde_json::from_value::<TensorDigests>(digests).unwrap()),
    }
}

#[test]
fn no_linear_takes_more_than_plans_are_judged_by() {
    let name = "model.layers.4095.mlp.experts.511.gate_proj".to_owned();
    let longest = linear(4095, name, -1.234_567_890_123_456_7e-300);
    let journal = journal_line(&longest).len();
    let report = serde_json::to_string_pretty(&[[&longest]]).unwrap().len();
    for bytes in [journal, report] {
        assert!(bytes as u64 <= LINEAR, "{bytes}");
    }
}

#[test]
fn a_report_and_a_journal_of_128_experts_in_94_blocks_are_read_again() {
    let (blocks, experts) = (94, 128);
    let block = |layer: usize| {
        let name = move |linear: String| format!("model.layers.{layer}.{linear}");
        let attention = ["q_proj", "k_proj", "v_proj", "o_proj"];
        let attention = attention.map(|it| format!("self_attn.{it}")).into_iter();
        let experts = (0..experts).flat_map(|expert| {
            let parts = ["gate_proj", "up_proj", "down_proj"];
            parts.map(|part| format!("mlp.experts.{expert}.{part}"))
        });
        attention.chain(experts).map(move |linear| {
            // A number that JSON's parser gets right to the last bit.
            let mut linear = self::linear(layer, name(linear), 0.375);
            linear.shape = [2048, 768];
            linear
        })
    };
    let count = blocks * (4 + 3 * experts);
    check_plan(&[count; 6]).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gptq-report/tests/matrix/main");
    let mut report = BranchReport::read(&sample).unwrap();
    report.linears = (0..blocks).flat_map(block).collect();
    report.write(dir.path()).unwrap();
    let read = BranchReport::read(dir.path()).unwrap();
    assert_eq!(read.linears.len(), count);
    assert!(read == report);

    let origin = Origin {
        path: "r.toml".into(),
        recipe: String::new(),
        overrides: RecipeOverrides::default(),
        directory: "/".into(),
    };
    let prints = [Fingerprint::default(), Fingerprint::default()];
    let header = Header::new(
        origin,
        prints,
        String::new(),
        BTreeMap::new(),
        BTreeMap::new(),
    );
    let mut lines = journal_line(&header);
    for layer in 0..blocks {
        let branch = BranchBlock {
            seconds: 1.0,
            linears: block(layer).collect(),
            clamped: Vec::new(),
            tuning: None,
            expert_tokens: Vec::new(),
            output_error: None,
        };
        branch.check(layer).unwrap();
        lines.extend(journal_line(&FinishedBlock {
            layer,
            source: String::new(),
            branches: BTreeMap::from([("main".to_owned(), branch)]),
            states: None,
        }));
    }
    fs::write(dir.path().join(JOURNAL), lines).unwrap();
    let read = RecordedRun::read(dir.path()).unwrap().unwrap();
    assert_eq!(read.blocks.len(), blocks);
    let last = &read.blocks[blocks - 1].branches["main"].linears;
    assert!(last[..] == report.linears[count - last.len()..]);
}
