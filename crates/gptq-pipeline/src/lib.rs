//! Recipe to plan to run to report.
//!
//! Reading order: [`Recipe`] is the TOML as typed; [`Plan`] is the recipe made valid against a
//! model's shapes, and below it nothing is checked again; [`quantize`] is the run; [`BranchReport`]
//! is what each branch directory says about itself.

#![forbid(unsafe_code)]

mod allocate;
mod branch_files;
mod branch_plan;
mod branch_writer;
mod budget;
mod byte_size;
mod disk_space;
mod error;
mod fingerprint;
mod gram;
mod hidden_range;
mod inputs;
mod journal;
mod kept_states;
mod measure;
mod memory;
mod method;
mod model_files;
mod moved;
mod output_errors;
mod overrides;
mod pattern;
mod plan;
mod profile;
mod quantize;
mod read_ahead;
mod recipe;
mod report;
mod report_limits;
mod resume;
mod run;
mod scratch;
mod share;
mod sources;
mod stream;
mod texts;
mod write_behind;
mod written_config;

pub use branch_plan::{BranchPlan, ColumnOrder, PlannedLinear};
pub use budget::{AllocatedGroup, Allocation, Budget, Choice};
pub use error::PipelineError;
pub use fingerprint::Fingerprint;
pub use gptq_solver::Gains;
pub use hidden_range::{Clamped, Overflow};
pub use inputs::{Fetched, InputSource};
pub use memory::Memory;
pub use method::{Method, Preset};
pub use overrides::{RecipeOverrides, RenderingOverride};
pub use plan::{Numerics, Plan, Propagation, Weights, parse_size};
pub use profile::{Phase, Profile};
pub use quantize::{Event, Outcome, RunOptions, quantize};
pub use recipe::{Recipe, RecipeError};
pub use report::{
    BlockReport, BranchReport, LinearReport, Measure, ModelFiles, Perplexity, PhaseSeconds, Solved,
    Summary,
};
pub use resume::unfinished;
pub use share::Share;
pub use texts::{Look, check_texts};
