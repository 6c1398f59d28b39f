//! The report of a branch: `report.json`, and `report.csv` with one row per linear layer.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use gptq_calibration::Manifest;
use gptq_format::{
    Bits, FileDigest, FormatError, GroupSize, LinearShape, MAX_REPORT, QuantizeConfig,
    TensorDigests, read_json_within, write_file, write_json_within,
};
use gptq_solver::Gains;
use serde::{Deserialize, Serialize};

use crate::csv_text::csv_text;
use crate::limits::{
    MAX_CLAMPED, MAX_COUNT, MAX_ENTRIES, MAX_FEATURES, MAX_KINDS, MAX_LAYERS, MAX_NAME,
    MAX_WEIGHTS, below, group, most, number, seconds,
};
use crate::{Allocation, BlockReport, ColumnOrder, Fingerprint, Method, Perplexity, Preset, Share};

/// The report's name in a branch directory.
pub const REPORT: &str = "report.json";

/// Results of one linear layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinearReport {
    /// Block index.
    pub layer: usize,
    /// Full module name.
    pub name: String,
    /// `[out_features, in_features]`.
    pub shape: [usize; 2],
    /// Code width.
    pub bits: Bits,
    /// Columns per group.
    pub group_size: GroupSize,
    /// `‖(Ŵ - W)X̂‖² / ‖WX̂‖²` on the branch's own calibration inputs, undamped: the distance of
    /// the weights from the original ones, which activation-mismatch correction increases on
    /// purpose.
    pub relative_error: f64,
    /// The same for round to nearest.
    pub rtn_error: f64,
    /// `relative_error / rtn_error`.
    pub ratio: f64,
    /// `‖ŴX̂ - WX‖² / ‖WX‖²`, against the dense model's output on its own inputs `X`, on the tokens
    /// of [`BranchReport::compared`]; absent in older reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_error: Option<f64>,
    /// The same for round to nearest, on the branch's inputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtn_output_error: Option<f64>,
    /// `‖(W' - Ŵ)X̂‖² / ‖WX̂‖²` on all calibration inputs, undamped, for the weights `W'` that were
    /// rounded: the solver's objective. Without activation-mismatch correction `W'` is `W`, and
    /// this equals `relative_error`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solver_objective: Option<f64>,
    /// Gains of the options beyond plain GPTQ; absent in older reports.
    #[serde(default)]
    pub gains: Gains,
    /// Damping used, as a fraction of the mean diagonal.
    pub damp_percent: f64,
    /// Number of inputs that were always zero.
    pub dead_columns: usize,
    /// Seconds to factor and solve, divided evenly among the linear layers of a tap.
    pub seconds: f64,
    /// Digests of its tensors as written; absent in older reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digests: Option<TensorDigests>,
}

impl LinearReport {
    /// Returns its shape as it is stored.
    pub fn stored(&self) -> LinearShape {
        let [out_features, in_features] = self.shape;
        LinearShape {
            in_features,
            out_features,
            bits: self.bits,
            group_size: self.group_size,
        }
    }

    /// Checks that its numbers are in the range of a run's.
    ///
    /// # Errors
    /// Describes the first field that is out of range.
    pub(crate) fn check(&self) -> Result<(), String> {
        below("layer", self.layer, MAX_LAYERS)?;
        most("name", self.name.len(), MAX_NAME)?;
        if self.shape.contains(&0) || self.shape.iter().any(|&n| n > MAX_FEATURES) {
            return Err(format!("shape = {:?} is not within 1 and 2^24", self.shape));
        }
        group("group_size", self.group_size)?;
        let gains = self.gains.used();
        let gains = gains.map(|(name, gain)| (format!("gains.{name}"), gain));
        let numbers = [
            ("relative_error", self.relative_error),
            ("rtn_error", self.rtn_error),
            ("ratio", self.ratio),
            ("damp_percent", self.damp_percent),
        ];
        let numbers = numbers.map(|(name, value)| (name.to_owned(), value));
        for (name, value) in numbers.into_iter().chain(gains) {
            number(&name, value)?;
        }
        for (name, value) in [
            ("output_error", self.output_error),
            ("rtn_output_error", self.rtn_output_error),
            ("solver_objective", self.solver_objective),
        ] {
            number(name, value.unwrap_or_default())?;
        }
        most("dead_columns", self.dead_columns, MAX_FEATURES)?;
        if let Some(digests) = &self.digests {
            digests.check().map_err(|why| format!("digests: {why}"))?;
        }
        seconds("seconds", self.seconds)
    }

    /// Returns its error and round-to-nearest's by `measure`; NaN if not measured.
    pub fn errors(&self, measure: Measure) -> [f64; 2] {
        match measure {
            Measure::Output => {
                [self.output_error, self.rtn_output_error].map(|it| it.unwrap_or(f64::NAN))
            }
            Measure::Weights => [self.relative_error, self.rtn_error],
        }
    }

    /// Returns the error as a fraction of round-to-nearest's; 1 if that is zero.
    pub fn of_rtn(&self, measure: Measure) -> f64 {
        match self.errors(measure) {
            [_, 0.0] => 1.0,
            [error, rtn] => error / rtn,
        }
    }

    /// Returns true if round to nearest is better by every available measure. A single measure is
    /// not enough: correction moves weights away from the original ones, and the error of the
    /// inputs may partly cancel that of rounding.
    pub fn is_worse_than_rtn(&self) -> bool {
        let output = self.output_error.zip(self.rtn_output_error);
        self.relative_error > self.rtn_error && output.is_none_or(|(own, rtn)| own > rtn)
    }
}

/// Reference that an error is measured against.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Measure {
    /// The dense model's output ([`LinearReport::output_error`]).
    Output,
    /// The original weights ([`LinearReport::relative_error`]), for reports without output errors.
    Weights,
}

impl Measure {
    /// Returns the first measure that all of `reports` have, since different measures are not
    /// comparable.
    pub fn of<'a>(reports: impl IntoIterator<Item = &'a BranchReport>) -> Measure {
        let compared = |report: &BranchReport| {
            let mut linears = report.linears.iter();
            linears.all(|it| it.output_error.is_some() && it.rtn_output_error.is_some())
        };
        match reports.into_iter().all(compared) {
            true => Measure::Output,
            false => Measure::Weights,
        }
    }

    /// Returns the name for a table: "output error", "weight error".
    pub fn name(self) -> &'static str {
        match self {
            Measure::Output => "output error",
            Measure::Weights => "weight error",
        }
    }
}

/// Values of hidden states before a tap that were clamped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clamped {
    /// Block index.
    pub layer: usize,
    /// The linear layers before the states: "qkv", "o", "gate_up", "down", or "block".
    pub after: String,
    /// Number of such values.
    pub values: usize,
}

impl Clamped {
    /// Checks that its numbers are in the range of a run's.
    ///
    /// # Errors
    /// Describes the first field that is out of range.
    pub(crate) fn check(&self) -> Result<(), String> {
        below("layer", self.layer, MAX_LAYERS)?;
        most("values", self.values, MAX_COUNT)
    }
}

/// Settings that a branch's columns were solved with, whatever its files declare to clients.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SolvedWith {
    /// Columns were solved by descending energy of their inputs.
    pub act_order: bool,
    /// Requested damping, as a fraction of the mean diagonal.
    pub damp_percent: f64,
}

/// Seconds of one phase of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseSeconds {
    /// The phase's name.
    pub phase: String,
    /// Seconds of the run's main thread.
    pub seconds: f64,
}

/// A model's weight files, by name.
pub type ModelFiles = BTreeMap<String, FileDigest>;

/// A finished branch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BranchReport {
    /// Version of this program.
    pub gptq_version: String,
    /// Public name of the base model.
    pub model: String,
    /// The base model's weight files; absent in older reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_files: Option<ModelFiles>,
    /// The branch's name.
    pub branch: String,
    /// Its settings as clients see them.
    pub quantize_config: QuantizeConfig,
    /// Solving settings; older reports have only what clients see.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solved: Option<SolvedWith>,
    /// Preset of the method.
    pub preset: Preset,
    /// Options of the method; absent in the oldest reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
    /// Mixed-precision allocation, if there was a size budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Allocation>,
    /// "quantised" or "dense": source of the hidden states for the Hessians.
    pub propagation: String,
    /// Calibration data.
    pub calibration: Manifest,
    /// Device of the run, "cpu" or "cuda:N".
    pub device: String,
    /// Bytes of the weight files.
    pub bytes: u64,
    /// Wall time spent on this branch alone, in seconds.
    pub seconds: f64,
    /// Phases of the whole run until this branch was finished, including its other branches.
    #[serde(default)]
    pub phases: Vec<PhaseSeconds>,
    /// Inputs and settings that determine its bytes; absent in older reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
    /// The recipe as typed.
    pub recipe: String,
    /// The command line, with absolute paths reduced to their last component.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Hidden states that were clamped, if the recipe allowed it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clamped: Vec<Clamped>,
    /// Perplexity, if the run measured it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<Perplexity>,
    /// The calibration tokens used for output errors; absent in older reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compared: Option<Share>,
    /// One entry per block, if outputs were compared.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<BlockReport>,
    /// One entry per linear layer.
    pub linears: Vec<LinearReport>,
}

/// Summary of a branch by one [`Measure`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Mean error over the linear layers.
    pub mean_error: f64,
    /// Largest error.
    pub worst_error: f64,
    /// Mean of the ratios to round to nearest.
    pub mean_ratio: f64,
}

impl BranchReport {
    /// Returns the solving settings.
    pub fn solved(&self) -> SolvedWith {
        self.solved.unwrap_or(SolvedWith {
            act_order: self.quantize_config.desc_act,
            damp_percent: self.quantize_config.damp_percent.unwrap_or_default(),
        })
    }

    /// Returns the solving order and the kind of groups.
    pub fn order(&self) -> ColumnOrder {
        ColumnOrder {
            desc_act: self.solved().act_order,
            static_groups: self.quantize_config.static_groups,
        }
    }

    /// Computes means and maxima over the linear layers.
    pub fn summary(&self, measure: Measure) -> Summary {
        let n = self.linears.len().max(1) as f64;
        let errors = || self.linears.iter().map(|l| l.errors(measure)[0]);
        Summary {
            mean_error: errors().sum::<f64>() / n,
            worst_error: errors().fold(0.0, f64::max),
            mean_ratio: self.linears.iter().map(|l| l.of_rtn(measure)).sum::<f64>() / n,
        }
    }

    /// Returns the mean of the solver's objective, if the report has it.
    pub fn mean_objective(&self) -> Option<f64> {
        let all = self.linears.iter().map(|l| l.solver_objective);
        let sum: f64 = all.collect::<Option<Vec<_>>>()?.iter().sum();
        Some(sum / self.linears.len().max(1) as f64)
    }

    /// Returns the accumulated error of all blocks, if it was measured.
    pub fn last_block_error(&self) -> Option<f64> {
        let last = self.blocks.iter().max_by_key(|block| block.layer);
        last.map(|block| block.output_error)
    }

    /// Reads the `report.json` of a branch directory.
    ///
    /// # Errors
    /// A file that cannot be read, or a value that no run can produce; the error names the field.
    pub fn read(dir: &Path) -> Result<Self, FormatError> {
        let path = dir.join(REPORT);
        let report: BranchReport = read_json_within(&path, MAX_REPORT)?;
        match report.check() {
            Ok(()) => Ok(report),
            Err(reason) => Err(FormatError::Malformed { path, reason }),
        }
    }

    /// Adds a measured perplexity to the report of the finished branch in `dir`.
    pub fn record_perplexity(
        &mut self,
        dir: &Path,
        perplexity: Perplexity,
    ) -> Result<(), FormatError> {
        self.perplexity = Some(perplexity);
        self.write_json(dir)
    }

    /// Writes `report.json`, within the limits of [`BranchReport::read`].
    fn write_json(&self, dir: &Path) -> Result<(), FormatError> {
        let path = dir.join(REPORT);
        match self.check() {
            Ok(()) => write_json_within(&path, self, MAX_REPORT),
            Err(reason) => Err(FormatError::Malformed { path, reason }),
        }
    }

    /// Writes `report.json` and `report.csv` into `dir`.
    pub fn write(&self, dir: &Path) -> Result<(), FormatError> {
        self.write_json(dir)?;
        write_file(&dir.join("report.csv"), self.csv().as_bytes())
    }

    /// Checks that every number is within its limits.
    ///
    /// # Errors
    /// Describes the first field that is out of range.
    fn check(&self) -> Result<(), String> {
        let config = &self.quantize_config;
        group("quantize_config.group_size", config.group_size)?;
        number("damp_percent", self.solved().damp_percent)?;
        seconds("seconds", self.seconds)?;
        most("phases", self.phases.len(), MAX_ENTRIES)?;
        for (i, phase) in self.phases.iter().enumerate() {
            seconds(&format!("phases[{i}].seconds"), phase.seconds)?;
        }
        let calibration = &self.calibration;
        most("calibration.samples", calibration.samples, MAX_FEATURES)?;
        most("calibration.seq_len", calibration.seq_len, MAX_FEATURES)?;
        if let Some(measured) = &self.perplexity {
            measured.check()?;
        }
        self.budget.iter().try_for_each(Allocation::check)?;
        most("clamped", self.clamped.len(), MAX_CLAMPED)?;
        for (i, states) in self.clamped.iter().enumerate() {
            states
                .check()
                .map_err(|why| format!("clamped[{i}].{why}"))?;
        }
        if let Some(share) = &self.compared {
            most("compared.windows", share.windows, MAX_FEATURES)?;
            most("compared.tokens", share.tokens, MAX_FEATURES)?;
        }
        most("blocks", self.blocks.len(), MAX_LAYERS)?;
        for (i, it) in self.blocks.iter().enumerate() {
            it.check().map_err(|why| format!("blocks[{i}].{why}"))?;
        }
        let linears = MAX_LAYERS * MAX_KINDS;
        most("linears", self.linears.len(), linears)?;
        let mut weights = 0;
        let mut kinds = BTreeSet::new();
        for (i, it) in self.linears.iter().enumerate() {
            it.check().map_err(|why| format!("linears[{i}].{why}"))?;
            let index = format!(".{}.", it.layer);
            kinds.insert(it.name.split_once(&index).map_or(&*it.name, |name| name.1));
            if kinds.len() > MAX_KINDS {
                return Err(format!(
                    "linears[{i}].name: over {MAX_KINDS} different linear layers in a block"
                ));
            }
            let [n_out, n_in] = it.shape.map(|n| n as u64);
            weights += n_out * n_in;
            if weights > MAX_WEIGHTS {
                return Err(format!("linears[{i}].shape: over 2^48 weights together"));
            }
        }
        Ok(())
    }

    fn csv(&self) -> String {
        let some = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:e}"));
        // The first entry of a block counts.
        let blocks = self.blocks.iter().rev();
        let blocks: BTreeMap<usize, f64> = blocks.map(|it| (it.layer, it.output_error)).collect();
        let rows = self.linears.iter().map(|l| {
            let [n_out, n_in] = l.shape;
            [
                l.layer.to_string(),
                l.name.clone(),
                n_out.to_string(),
                n_in.to_string(),
                l.bits.to_string(),
                l.group_size.to_string(),
                format!("{:e}", l.relative_error),
                format!("{:e}", l.rtn_error),
                format!("{:.6}", l.ratio),
                some(l.output_error),
                some(l.rtn_output_error),
                some(l.solver_objective),
                some(blocks.get(&l.layer).copied()),
                l.damp_percent.to_string(),
                l.dead_columns.to_string(),
                some(l.gains.scale_search),
                some(l.gains.mismatch_correction),
                some(l.gains.refine),
                format!("{:.4}", l.seconds),
            ]
        });
        csv_text(COLUMNS, rows)
    }
}

/// Columns of `report.csv`.
const COLUMNS: [&str; 19] = [
    "layer",
    "name",
    "out_features",
    "in_features",
    "bits",
    "group_size",
    "relative_error",
    "rtn_error",
    "ratio",
    "output_error",
    "rtn_output_error",
    "solver_objective",
    "block_output_error",
    "damp_percent",
    "dead_columns",
    "search_gain",
    "asymmetric_gain",
    "refine_gain",
    "seconds",
];

#[cfg(test)]
mod tests;
