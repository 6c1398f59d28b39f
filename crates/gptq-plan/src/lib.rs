//! Recipe to plan, its sizes, and the schemas of what a run and a verification write: no Burn, no devices.
//!
//! Reading order: [`Recipe`] is the TOML as typed; [`Plan`] is the recipe made valid against a model's
//! shapes, and below it nothing is checked again; [`Memory`] is what a run of it holds; [`BranchReport`] is
//! what each branch directory says about itself, [`RecordedRun`] the journal of a run under way.

#![forbid(unsafe_code)]

mod allocate;
mod allocation;
mod block_report;
mod branch_files;
mod branch_plan;
mod branch_resolution;
mod budget;
mod byte_size;
mod chunking;
mod column_order;
mod csv_text;
mod dynamic;
mod error;
mod fingerprint;
mod inputs;
mod journal;
mod limits;
mod memory;
mod method;
mod overrides;
mod pattern;
mod perplexity;
mod plan;
mod receipt;
mod recipe;
mod recipe_draft;
mod recipe_file;
mod report;
mod scaling;
mod share;
mod texts;
mod tuning_memory;
mod written_config;

pub use allocation::{AllocatedGroup, Allocation, Budget, Choice};
pub use block_report::{BlockReport, ExpertSpread, FEW_TOKENS, Tuning, TuningLoss};
pub use branch_files::BranchFiles;
pub use branch_plan::{BranchPlan, ModuleOverride, PlannedLinear, check_name};
pub use budget::{OpenGroup, apply_allocation, open_groups, spend_budget};
pub use byte_size::{at_least, parse_size, spelt};
pub use chunking::Chunking;
pub use column_order::ColumnOrder;
pub use csv_text::csv_text;
pub use dynamic::dynamic;
pub use error::PlanError;
pub use fingerprint::Fingerprint;
pub use inputs::{FetchedInputs, InputSource, calibration_source, find_model, model_source};
pub use journal::{BranchBlock, FinishedBlock, Header, JOURNAL, Origin, RecordedRun, journal_line};
pub use limits::{MAX_CURVE, MAX_JOURNAL};
pub use memory::{Memory, Places};
pub use method::{ExpertTokens, Method, Preset};
pub use overrides::{RecipeOverrides, RenderingOverride};
pub use perplexity::Perplexity;
pub use plan::{Numerics, Plan, Propagation, Weights};
pub use receipt::{
    BlockError, Check, Depth, F16Overflow, F16Range, NearestRounding, RECEIPT, Receipt, Tolerances,
    failures,
};
pub use recipe::{Recipe, RecipeError};
pub use recipe_draft::{DraftedBranches, RecipeDraft, last_name};
pub use report::{
    BranchReport, Clamped, LinearReport, Measure, ModelFiles, PhaseSeconds, REPORT, SolvedWith,
    Summary,
};
pub use scaling::{RankDevice, Scaling};
pub use share::{SHARE, Share};
pub use texts::{Look, check_texts, tokenizer_note};
pub use written_config::written_config;
