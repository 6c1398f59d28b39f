//! The tables and keys of a recipe file, as TOML has them.

use std::path::PathBuf;

use gptq_calibration::{OnError, Sampling};
use gptq_format::{Bits, FormatName, GroupSize, Half};
use serde::Deserialize;
use toml::Spanned;

use crate::{Choice, ExpertTokens, Preset};

/// Reads the whole file as one document.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RecipeFile {
    #[serde(default)]
    pub propagate: Propagate,
    pub model: ModelTable,
    pub calibration: CalibrationTable,
    pub output: OutputTable,
    pub evaluation: Option<EvaluationTable>,
    #[serde(default)]
    pub numerics: NumericsTable,
    #[serde(default)]
    pub defaults: SettingsTable,
    #[serde(default)]
    pub branch: Vec<Spanned<BranchTable>>,
}

/// Source of the hidden states that a branch is calibrated on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Propagate {
    /// Each branch's own; older recipes spell it `quantised`.
    #[default]
    #[serde(alias = "quantised")]
    Quantized,
    Dense,
}

/// The `[model]` table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ModelTable {
    pub source: Spanned<String>,
    pub revision: Option<Spanned<String>>,
    #[serde(default)]
    pub dtype: Half,
}

/// The `[calibration]` table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CalibrationTable {
    pub source: Spanned<String>,
    pub revision: Option<Spanned<String>>,
    pub files: Option<Spanned<String>>,
    pub template: Option<Spanned<String>>,
    pub column: Option<Spanned<String>>,
    pub messages: Option<Spanned<String>>,
    pub tokens: Option<Spanned<String>>,
    pub chat_template: Option<Spanned<ChatChoice>>,
    #[serde(default = "default_rows")]
    pub rows: Spanned<String>,
    #[serde(default)]
    pub min_tokens: usize,
    #[serde(default)]
    pub dedupe: bool,
    #[serde(default)]
    pub on_error: OnError,
    pub date: Option<Spanned<String>>,
    #[serde(default = "default_samples")]
    pub samples: Spanned<usize>,
    #[serde(default = "default_seq_len")]
    pub seq_len: Spanned<usize>,
    #[serde(default)]
    pub seed: u64,
    #[serde(default)]
    pub sampling: Sampling,
}

/// Template for `messages`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ChatChoice {
    Tokenizer,
    Chatml,
}

/// The `[output]` table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OutputTable {
    pub dir: Spanned<PathBuf>,
    pub shard_size: Option<Spanned<String>>,
}

/// The `[evaluation]` table.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EvaluationTable {
    pub text: Spanned<PathBuf>,
    #[serde(default = "default_window")]
    pub window: Spanned<usize>,
}

/// The `[numerics]` table: handling of numbers that are out of range.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NumericsTable {
    #[serde(default)]
    pub overflow: OnOverflow,
    pub max_damping: Option<Spanned<f64>>,
}

/// Handling of hidden states beyond the range of their storage type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OnOverflow {
    #[default]
    Stop,
    Clamp,
}

/// Settings of a branch, or of all of them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SettingsTable {
    pub format: Option<FormatName>,
    pub bits: Option<Spanned<Bits>>,
    pub group_size: Option<Spanned<GroupSize>>,
    pub budget_bits: Option<Spanned<f64>>,
    pub budget_choices: Option<Spanned<Vec<Choice>>>,
    pub desc_act: Option<bool>,
    pub static_groups: Option<bool>,
    pub sym: Option<bool>,
    pub damp_percent: Option<Spanned<f64>>,
    pub true_sequential: Option<bool>,
    pub preset: Option<Preset>,
    pub scale_search: Option<bool>,
    pub refine: Option<Spanned<usize>>,
    pub tune: Option<Spanned<usize>>,
    pub mismatch_correction: Option<Spanned<f64>>,
    pub experts: Option<ExpertTokens>,
    /// Its old spelling.
    pub asymmetric: Option<Spanned<f64>>,
}

/// A `[[branch]]` table. Its settings are spelled out rather than flattened from [`SettingsTable`]: serde cannot
/// refuse unknown keys through a flattened struct.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BranchTable {
    pub name: Spanned<String>,
    pub format: Option<FormatName>,
    pub bits: Option<Spanned<Bits>>,
    pub group_size: Option<Spanned<GroupSize>>,
    pub budget_bits: Option<Spanned<f64>>,
    pub budget_choices: Option<Spanned<Vec<Choice>>>,
    pub desc_act: Option<bool>,
    pub static_groups: Option<bool>,
    pub sym: Option<bool>,
    pub damp_percent: Option<Spanned<f64>>,
    pub true_sequential: Option<bool>,
    pub preset: Option<Preset>,
    pub scale_search: Option<bool>,
    pub refine: Option<Spanned<usize>>,
    pub tune: Option<Spanned<usize>>,
    pub mismatch_correction: Option<Spanned<f64>>,
    pub experts: Option<ExpertTokens>,
    /// Its old spelling.
    pub asymmetric: Option<Spanned<f64>>,
    #[serde(default, rename = "override")]
    pub overrides: Vec<OverrideTable>,
}

/// Settings of the modules that a pattern matches; the first match counts.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OverrideTable {
    #[serde(rename = "match")]
    pub pattern: Spanned<String>,
    pub bits: Option<Spanned<Bits>>,
    pub group_size: Option<Spanned<GroupSize>>,
    #[serde(default)]
    pub skip: bool,
}

fn spanned<T>(value: T) -> Spanned<T> {
    Spanned::new(0..0, value)
}

fn default_rows() -> Spanned<String> {
    spanned("0:".into())
}

fn default_samples() -> Spanned<usize> {
    spanned(128)
}

fn default_seq_len() -> Spanned<usize> {
    spanned(2048)
}

pub(crate) fn default_window() -> Spanned<usize> {
    spanned(1024)
}
