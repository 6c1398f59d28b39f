//! What the fuzz targets share: checkpoints and rows of given files, and `gptq-model`'s and
//! `gptq-pipeline`'s reading of configs and recipes without Burn, which would take minutes to build
//! with instrumentation.

// The modules below find what they name of `gptq-model` here.
extern crate self as gptq_model;

#[allow(dead_code, reason = "only a run measures and allocates")]
#[path = "../../crates/gptq-pipeline/src/allocate.rs"]
mod allocate;
#[allow(dead_code, reason = "only a run writes files")]
#[path = "../../crates/gptq-pipeline/src/branch_files.rs"]
mod branch_files;
#[path = "../../crates/gptq-pipeline/src/branch_plan.rs"]
mod branch_plan;
#[allow(dead_code, reason = "only a run measures and allocates")]
#[path = "../../crates/gptq-pipeline/src/budget.rs"]
mod budget;
#[path = "../../crates/gptq-model/src/config.rs"]
mod config;
#[path = "../../crates/gptq-model/src/error.rs"]
mod error;
#[path = "../../crates/gptq-pipeline/src/inputs.rs"]
mod inputs;
#[path = "../../crates/gptq-model/src/layout.rs"]
mod layout;
#[path = "../../crates/gptq-pipeline/src/method.rs"]
mod method;
#[path = "../../crates/gptq-pipeline/src/overrides.rs"]
mod overrides;
#[path = "../../crates/gptq-pipeline/src/pattern.rs"]
mod pattern;
#[expect(dead_code, reason = "only a run takes branches out of a plan")]
#[path = "../../crates/gptq-pipeline/src/plan.rs"]
mod plan;
#[path = "../../crates/gptq-pipeline/src/recipe.rs"]
mod recipe;

use std::fs;
use std::ops::ControlFlow;
use std::panic;
use std::path::Path;
use std::sync::Once;

use gptq_calibration::Source;
use gptq_format::{Checkpoint, Half};
use tempfile::TempDir;
use thiserror::Error;

pub use branch_plan::BranchPlan;
pub use budget::{Allocation, Budget, Choice};
pub use config::ModelConfig;
pub use error::ModelError;
pub use inputs::{Fetched, InputSource};
pub use layout::{Projection, Stage};
pub use method::{Method, Preset};
pub use overrides::{RecipeOverrides, RenderingOverride};
pub use plan::{Numerics, Plan, Propagation, parse_size};
pub use recipe::{Recipe, RecipeError};

/// In place of `gptq-pipeline`'s, which knows devices.
#[derive(Debug, Error)]
#[allow(missing_docs, reason = "it stands in for another")]
pub enum PipelineError {
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// In place of `gptq-pipeline`'s, which knows devices.
pub struct Memory;

impl Memory {
    fn of(_: &Plan) -> Self {
        Memory
    }
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
                    let _ = checkpoint.half_bytes(half, name, view.shape);
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

/// Reads the rows of a file of this name, with columns that the starting inputs have.
pub fn rows(name: &str, file: &[u8]) {
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
