//! What the fuzz targets share: checkpoints and rows of given files, and `gptq-model`'s and
//! `gptq-pipeline`'s reading of configs, recipes and reports, and what `gptq-report` makes of these, without
//! Burn, which would take minutes to build with instrumentation.

// The modules below find here what they name of these crates.
extern crate self as gptq_kernels;
extern crate self as gptq_model;
extern crate self as gptq_pipeline;

#[allow(dead_code, reason = "only a run measures and allocates")]
#[path = "../../crates/gptq-pipeline/src/allocate.rs"]
mod allocate;
#[allow(dead_code, reason = "only a run writes files")]
#[path = "../../crates/gptq-pipeline/src/branch_files.rs"]
mod branch_files;
#[path = "../../crates/gptq-model/src/block_builder.rs"]
mod block_builder;
#[path = "../../crates/gptq-report/src/base_card.rs"]
mod base_card;
#[path = "../../crates/gptq-report/src/branch_page.rs"]
mod branch_page;
#[path = "../../crates/gptq-pipeline/src/branch_plan.rs"]
mod branch_plan;
#[allow(dead_code, reason = "only a run measures and allocates")]
#[path = "../../crates/gptq-pipeline/src/budget.rs"]
mod budget;
#[allow(dead_code, reason = "the command says what a card lacks")]
#[path = "../../crates/gptq-report/src/card.rs"]
mod card;
#[allow(dead_code, reason = "only a run reads the checkpoint")]
#[path = "../../crates/gptq-model/src/census.rs"]
mod census;
#[path = "../../crates/gptq-model/src/config.rs"]
mod config;
#[path = "../../crates/gptq-report/src/description.rs"]
mod description;
#[path = "../../crates/gptq-model/src/error.rs"]
mod error;
#[path = "../../crates/gptq-model/src/families/mod.rs"]
mod families;
#[path = "../../crates/gptq-report/src/heat_map.rs"]
mod heat_map;
#[path = "../../crates/gptq-report/src/html.rs"]
mod html;
#[allow(dead_code, reason = "only a run reads the checkpoint")]
#[path = "../../crates/gptq-model/src/inventory.rs"]
mod inventory;
#[path = "../../crates/gptq-pipeline/src/inputs.rs"]
mod inputs;
#[path = "../../crates/gptq-model/src/keys.rs"]
mod keys;
#[path = "../../crates/gptq-report/src/matrix.rs"]
mod matrix;
#[path = "../../crates/gptq-report/src/measured.rs"]
mod measured;
#[allow(dead_code, reason = "only a run finds places for what it holds")]
#[path = "../../crates/gptq-pipeline/src/memory.rs"]
mod memory;
#[path = "../../crates/gptq-pipeline/src/method.rs"]
mod method;
#[path = "../../crates/gptq-report/src/number.rs"]
mod number;
#[path = "../../crates/gptq-pipeline/src/overrides.rs"]
mod overrides;
#[path = "../../crates/gptq-pipeline/src/pattern.rs"]
mod pattern;
#[expect(dead_code, reason = "only a run takes branches out of a plan")]
#[path = "../../crates/gptq-pipeline/src/plan.rs"]
mod plan;
#[path = "../../crates/gptq-report/src/plot.rs"]
mod plot;
#[allow(dead_code, reason = "the command loads a template by name")]
#[path = "../../crates/gptq-report/src/prompt.rs"]
mod prompt;
#[path = "../../crates/gptq-report/src/provenance.rs"]
mod provenance;
#[path = "../../crates/gptq-pipeline/src/recipe.rs"]
mod recipe;
#[allow(dead_code, reason = "only a forward pass stretches frequencies")]
#[path = "../../crates/gptq-model/src/rope_scaling.rs"]
mod rope_scaling;
#[allow(dead_code, reason = "only a run writes reports")]
#[path = "../../crates/gptq-pipeline/src/report.rs"]
mod report;
#[allow(dead_code, reason = "only the command meets all of them")]
#[path = "../../crates/gptq-report/src/error.rs"]
mod report_error;
#[path = "../../crates/gptq-pipeline/src/report_limits.rs"]
mod report_limits;
#[allow(dead_code, reason = "only a run takes them out of the windows")]
#[path = "../../crates/gptq-pipeline/src/share.rs"]
mod share;
#[allow(dead_code, reason = "only a forward pass runs the operations")]
#[path = "../../crates/gptq-model/src/spec.rs"]
mod spec;
#[path = "../../crates/gptq-report/src/table.rs"]
mod table;
#[allow(dead_code, reason = "only a run writes configs")]
#[path = "../../crates/gptq-pipeline/src/written_config.rs"]
mod written_config;

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::panic;
use std::path::{Path, PathBuf};
use std::sync::Once;

use gptq_calibration::Source;
use gptq_format::{Checkpoint, Half};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;
use thiserror::Error;

pub use block_builder::BlockBuilder;
pub use branch_plan::{BranchPlan, ColumnOrder, PlannedLinear};
pub use budget::{Allocation, Budget, Choice};
pub use census::Census;
pub use card::{CardSettings, Facts, card, facts};
pub use config::ModelConfig;
pub use error::ModelError;
pub use gptq_solver::Gains;
pub use html::html;
pub use inputs::{Fetched, InputSource};
pub use inventory::{ModelTensor, Role};
pub use matrix::{BlockError, Branch, Check, Matrix, Receipt};
pub use measured::{Measured, Windows};
pub use memory::Memory;
pub use method::{Method, Preset};
pub use overrides::{RecipeOverrides, RenderingOverride};
pub use plan::{Numerics, Plan, Propagation, Weights, parse_size};
pub use prompt::PromptTemplate;
pub use recipe::{Recipe, RecipeError};
pub use rope_scaling::{RopeScaling, spell_out_rotary};
pub use share::Share;
pub use spec::{Attention, BlockSpec, Division, LinearSpec, Op, Register, Rope, VectorSpec};
pub use report::{
    BlockReport, BranchReport, LinearReport, Measure, ModelFiles, Perplexity, PhaseSeconds, Solved, Summary,
};
pub use report_error::ReportError;
pub use table::{Row, csv, rows};

/// In place of `gptq-pipeline`'s, which knows devices.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "it stands in for another")]
pub enum PipelineError {
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Format(#[from] gptq_format::FormatError),
    #[error("{}", dir.display())]
    Quantized { dir: PathBuf },
    #[error("{needed} of {budget}")]
    DeviceMemory { needed: u64, budget: u64 },
    #[error("{needed} of {budget}")]
    HostMemory { needed: u64, budget: u64 },
}

/// In place of `gptq-pipeline`'s, which knows tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "it stands in for another")]
pub struct Clamped {
    pub layer: usize,
    pub after: String,
    pub values: usize,
}

/// In place of `gptq-pipeline`'s, which knows devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(BTreeMap<String, String>);

/// In place of `gptq-kernels`', with the numbers that a plan's memory is reckoned from.
#[allow(missing_docs, reason = "it stands in for another")]
pub trait Engine {
    const LANES: usize = 1;
    const CHUNK_TOKENS: usize = 4096;
}

/// In place of `gptq-kernels`'.
pub struct Cpu;

impl Engine for Cpu {
    const LANES: usize = 4;
}

/// In place of `gptq-kernels`'.
pub struct Cuda;

impl Engine for Cuda {
    const CHUNK_TOKENS: usize = 16_384;
}

/// In place of `gptq-pipeline`'s.
mod gram {
    pub(crate) const DENSE_SHARE: usize = 4;
}

thread_local! {
    static DIR: TempDir = TempDir::new().expect("a temporary directory");
}

/// Most elements of a tensor that are gathered: a view with strides of 0 may claim any number.
const MAX_ELEMENTS: usize = 1 << 16;

/// Longest list of rows that is gone through.
const MAX_ROWS: usize = 1 << 12;

/// A directory with these files, and no other that an earlier call may have left.
pub fn with_files(files: &[(&str, &[u8])], read: impl FnOnce(&Path)) {
    DIR.with(|dir| {
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).expect("temporary files can be written");
        }
        read(dir.path());
        for (name, _) in files {
            fs::remove_file(dir.path().join(name)).expect("it was written");
        }
    });
}

/// Opens a directory with these files as a checkpoint, and touches every byte of every tensor.
pub fn open(files: &[(&str, &[u8])]) {
    with_files(files, |dir| {
        let Ok(checkpoint) = Checkpoint::open(dir) else {
            return;
        };
        for name in checkpoint.names() {
            let view = checkpoint.view(name).expect("it was listed");
            if view.elements() <= MAX_ELEMENTS {
                let bytes = view.bytes();
                assert_eq!(bytes.len(), view.elements() * view.dtype.bitsize() / 8);
                for half in [Half::F16, Half::Bf16] {
                    let _ = checkpoint.check_halves(half, name, view.shape);
                }
            }
        }
    });
}

/// For readers that catch the panics of a library: libFuzzer's hook would end the process before.
/// One that is not caught ends it still.
pub fn panics_may_be_caught() {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| panic::set_hook(Box::new(|_| ())));
}

/// Reads these bytes as the `report.json` of a branch directory, and what follows a zero byte as its
/// `verify.json`; makes the page, the table and the card.
pub fn report(bytes: &[u8]) {
    let mut parts = bytes.splitn(2, |&byte| byte == 0);
    let report = parts.next().unwrap_or_default();
    let mut files = vec![("report.json", report), ("config.json", &b"{}"[..])];
    files.extend(parts.next().map(|receipt| ("verify.json", receipt)));
    with_files(&files, |dir| {
        let Ok(matrix) = Matrix::read(dir) else {
            return;
        };
        assert!(!csv(&rows(&matrix)).is_empty());
        html(&matrix).expect("whatever was read can be drawn");
        let settings = CardSettings {
            repo: "user/name".to_owned(),
            prompt: PromptTemplate {
                own: false,
                name: "plain".to_owned(),
                text: "{prompt}".to_owned(),
            },
            base_card: None,
            base_model: None,
            dataset: None,
            license: None,
            language: None,
        };
        let facts = facts(&matrix, &settings).expect("the repository has a name");
        card(&facts, None).expect("whatever was read can be written about");
    });
}

/// Reads the rows of a file of this name, with columns that the starting inputs have.
pub fn calibration_rows(name: &str, file: &[u8]) {
    if name.ends_with(".parquet") || name.ends_with(".arrow") {
        panics_may_be_caught();
    }
    with_files(&[(name, file)], |dir| {
        let mut rows = 0;
        let source = Source::Local(dir.join(name));
        let _ = source.rows(&["input", "output"], &mut |_| {
            rows += 1;
            Ok(match rows < MAX_ROWS {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            })
        });
    });
}

/// Shapes of a model of two blocks.
pub fn small_model() -> ModelConfig {
    let config = serde_json::json!({
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 100,
    });
    ModelConfig::from_json(config).expect("the shapes are sound")
}
