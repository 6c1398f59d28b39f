//! What a branch says about itself: `report.json`, and `report.csv` with a row per linear.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use gptq_calibration::Manifest;
use gptq_format::{
    Bits, FileDigest, FormatError, GroupSize, LinearDigests, QuantizeConfig, read_json, write_file,
    write_json,
};
use gptq_solver::Gains;
use serde::{Deserialize, Serialize};

use crate::{Allocation, Clamped, Fingerprint, Method, Preset, report_limits};

/// Its name in a branch directory.
pub(crate) const FILE: &str = "report.json";

/// One linear's numbers.
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
    /// `‖(W - Q)X‖² / ‖WX‖²` on the calibration inputs, undamped.
    pub relative_error: f64,
    /// The same for round to nearest.
    pub rtn_error: f64,
    /// `relative_error / rtn_error`: what GPTQ gained.
    pub ratio: f64,
    /// What the options beyond plain GPTQ were good for; older reports have none.
    #[serde(default)]
    pub gains: Gains,
    /// Damping that was used, as a fraction of the mean diagonal.
    pub damp_percent: f64,
    /// Inputs that were always zero.
    pub dead_columns: usize,
    /// Time to factor and solve, shared evenly by the linears of a stage.
    pub seconds: f64,
    /// Of its tensors as written; older reports have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digests: Option<LinearDigests>,
}

impl LinearReport {
    /// Whether plain rounding would have lost less. Where both lose nothing, it would not.
    pub fn is_worse_than_rtn(&self) -> bool {
        self.relative_error > self.rtn_error
    }
}

/// Perplexity on some text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// File name of the text.
    pub text: String,
    /// Tokens per window.
    pub window: usize,
    /// Tokens scored.
    pub tokens: usize,
    /// Of the branch.
    pub value: f64,
    /// Of the dense model on the same tokens, if it was measured.
    #[serde(default)]
    pub dense: Option<f64>,
}

/// Seconds of one phase of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseSeconds {
    /// The phase's name.
    pub phase: String,
    /// Of the run's own thread.
    pub seconds: f64,
}

/// A model's weight files, by name.
pub type ModelFiles = BTreeMap<String, FileDigest>;

/// A finished branch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BranchReport {
    /// Version of this program.
    pub gptq_version: String,
    /// The base model's public name.
    pub model: String,
    /// The base model's weight files, as it was made from them; older reports name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model_files: Option<ModelFiles>,
    /// The branch's name.
    pub branch: String,
    /// Its settings as readers see them.
    pub quantize_config: QuantizeConfig,
    /// How codes and scales were found.
    pub preset: Preset,
    /// The options themselves; not in reports of before there were any to choose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
    /// How a size budget was spent, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Allocation>,
    /// "quantised" or "dense": the hidden states the Hessians came from.
    pub propagation: String,
    /// What it was calibrated on.
    pub calibration: Manifest,
    /// The device it was made on, "cpu" or "cuda:N".
    pub device: String,
    /// Bytes of the weight files.
    pub bytes: u64,
    /// Wall time spent on this branch alone.
    pub seconds: f64,
    /// The whole run until this branch was put in place, all its branches included, by phase.
    #[serde(default)]
    pub phases: Vec<PhaseSeconds>,
    /// What its bytes depend on; older reports have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
    /// The recipe as typed.
    pub recipe: String,
    /// The command line, absolute paths shortened to their last component.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// Hidden states that were brought back into the range of what they are kept in, where the recipe allowed it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clamped: Vec<Clamped>,
    /// Perplexity, if the run measured it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<Perplexity>,
    /// A row per linear.
    pub linears: Vec<LinearReport>,
}

/// The numbers a table of branches shows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Mean relative error over the linears.
    pub mean_error: f64,
    /// Largest relative error.
    pub worst_error: f64,
    /// Mean of the ratios to round to nearest.
    pub mean_ratio: f64,
}

impl BranchReport {
    /// Means and maxima over the linears.
    pub fn summary(&self) -> Summary {
        let n = self.linears.len().max(1) as f64;
        let sum = |f: fn(&LinearReport) -> f64| self.linears.iter().map(f).sum::<f64>();
        Summary {
            mean_error: sum(|l| l.relative_error) / n,
            worst_error: self
                .linears
                .iter()
                .map(|l| l.relative_error)
                .fold(0.0, f64::max),
            mean_ratio: sum(|l| l.ratio) / n,
        }
    }

    /// Reads the `report.json` of a branch directory.
    ///
    /// # Errors
    /// A file that cannot be read, or says what no run can have come to: it names the field.
    pub fn read(dir: &Path) -> Result<Self, FormatError> {
        let path = dir.join(FILE);
        let report = read_json(&path)?;
        match report_limits::check(&report) {
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

    /// Writes `report.json`, which is such as [`BranchReport::read`] takes.
    fn write_json(&self, dir: &Path) -> Result<(), FormatError> {
        let path = dir.join(FILE);
        match report_limits::check(self) {
            Ok(()) => write_json(&path, self),
            Err(reason) => Err(FormatError::Malformed { path, reason }),
        }
    }

    /// Writes `report.json` and `report.csv` into `dir`.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), FormatError> {
        self.write_json(dir)?;
        write_file(&dir.join("report.csv"), self.csv().as_bytes())
    }

    fn csv(&self) -> String {
        let mut csv = String::from(
            "layer,name,out_features,in_features,bits,group_size,relative_error,rtn_error,ratio,\
             damp_percent,dead_columns,search_gain,asymmetric_gain,refine_gain,seconds\n",
        );
        let gain = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:e}"));
        for l in &self.linears {
            let [n_out, n_in] = l.shape;
            writeln!(
                csv,
                "{},{},{n_out},{n_in},{},{},{:e},{:e},{:.6},{},{},{},{},{},{:.4}",
                l.layer,
                l.name,
                l.bits,
                l.group_size,
                l.relative_error,
                l.rtn_error,
                l.ratio,
                l.damp_percent,
                l.dead_columns,
                gain(l.gains.scale_search),
                gain(l.gains.asymmetric),
                gain(l.gains.refine),
                l.seconds
            )
            .expect("writing to a string cannot fail");
        }
        csv
    }
}
