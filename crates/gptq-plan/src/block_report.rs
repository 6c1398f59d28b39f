//! Results of one block of a branch: the error of its output, and its tuning.

use serde::{Deserialize, Serialize};

use crate::limits::{MAX_CURVE, MAX_LAYERS, below, most, number};

/// Tuning of a block: squared distances to the dense block's output over the tokens that it was tuned on, relative to
/// the squared length of what the dense block adds to the residual stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tuning {
    /// Before the first step.
    pub before: f64,
    /// With the parameters that were kept; never more than before.
    pub after: f64,
    /// Means over equal runs of steps, each before the step and on the step's tokens.
    pub curve: Vec<f64>,
}

impl Tuning {
    /// Checks that its numbers are in the range of a run's.
    ///
    /// # Errors
    /// Describes the first field that is out of range.
    pub(crate) fn check(&self) -> Result<(), String> {
        most("curve", self.curve.len(), MAX_CURVE)?;
        let values = self.curve.iter().chain([&self.before, &self.after]);
        values
            .copied()
            .try_for_each(|value| number("tuning", value))
    }
}

/// Results of one block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockReport {
    /// Block index.
    pub layer: usize,
    /// Mean over the tokens of [`BranchReport::compared`](crate::BranchReport::compared) of `‖ŷ - y‖² / ‖y‖²`, with the hidden
    /// states after the block `y` of the dense model and `ŷ` of the branch: the error accumulated
    /// so far.
    pub output_error: f64,
    /// Tuning, if it was tuned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuning: Option<Tuning>,
}

impl BlockReport {
    /// Checks that its numbers are in the range of a run's.
    ///
    /// # Errors
    /// Describes the first field that is out of range.
    pub(crate) fn check(&self) -> Result<(), String> {
        below("layer", self.layer, MAX_LAYERS)?;
        if let Some(tuning) = &self.tuning {
            tuning.check().map_err(|why| format!("tuning: {why}"))?;
        }
        number("output_error", self.output_error)
    }
}
