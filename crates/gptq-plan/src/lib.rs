//! Recipe to plan, its sizes, and the schemas of what a run and a verification write: no Burn, no devices.
//!
//! Reading order: [`Recipe`] is the TOML as typed; [`Plan`] is the recipe made valid against a model's
//! shapes, and below it nothing is checked again; [`Memory`] is what a run of it holds; [`BranchReport`] is
//! what each branch directory says about itself, [`Recorded`] the journal of a run under way.

#![forbid(unsafe_code)]

mod allocate;
mod branch_files;
mod branch_plan;
mod budget;
mod byte_size;
mod error;
mod fingerprint;
mod inputs;
mod journal;
mod memory;
mod method;
mod overrides;
mod pattern;
mod plan;
mod receipt;
mod recipe;
mod report;
mod report_limits;
mod share;
mod texts;
mod written_config;

pub use branch_plan::{BranchPlan, ColumnOrder, ModuleOverride, PlannedLinear, check_name};
pub use budget::{AllocatedGroup, Allocation, Budget, Choice, OpenGroup};
pub use byte_size::{at_least, parse_size, spelt};
pub use error::PlanError;
pub use fingerprint::Fingerprint;
pub use inputs::{Fetched, InputSource};
pub use journal::{BranchBlock, FinishedBlock, Header, JOURNAL, Origin, Recorded, journal_line};
pub use memory::{Chunking, Memory, Places};
pub use method::{Method, Preset};
pub use overrides::{RecipeOverrides, RenderingOverride};
pub use plan::{Numerics, Plan, Propagation, Weights};
pub use receipt::{
    BlockError, Check, Depth, F16Overflow, F16Range, NearestRounding, RECEIPT, Receipt, Tolerances,
    failures,
};
pub use recipe::{Recipe, RecipeError};
pub use report::{
    BlockReport, BranchReport, Clamped, LinearReport, Measure, ModelFiles, Perplexity,
    PhaseSeconds, REPORT, Solved, Summary,
};
pub use report_limits::MAX_JOURNAL;
pub use share::{DENSE_SHARE, SHARE, Share};
pub use texts::{Look, check_texts};
pub use written_config::written_config;
