//! Results of one block of a branch: the error of its output, and its tuning.

use serde::{Deserialize, Serialize};

use crate::limits::{MAX_COUNT, MAX_CURVE, MAX_KINDS, MAX_LAYERS, below, most, number};

/// A distance that a block is tuned by, over the tokens that it is tuned on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TuningLoss {
    /// The squared distance to the dense model's residual stream after the block, relative to the squared length of what
    /// the dense block adds to it.
    #[default]
    Output,
    /// The KL divergence of the predictions from the dense model's, in nats a token: the last block's.
    Predictions,
}

impl TuningLoss {
    fn is_output(&self) -> bool {
        *self == TuningLoss::Output
    }
}

/// Tuning of a block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tuning {
    /// The distance that the numbers below are.
    #[serde(default, skip_serializing_if = "TuningLoss::is_output")]
    pub loss: TuningLoss,
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
    /// Calibration tokens that the branch's router gave each expert, if the block has experts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub expert_tokens: Vec<usize>,
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
        most("expert_tokens", self.expert_tokens.len(), MAX_KINDS)?;
        let mut tokens = self.expert_tokens.iter();
        tokens.try_for_each(|&tokens| most("expert_tokens", tokens, MAX_COUNT))?;
        number("output_error", self.output_error)
    }
}

/// Tokens below which an expert is said to have few.
pub const FEW_TOKENS: usize = 64;

/// Spread of the calibration tokens over the experts by a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertSpread {
    /// Number of experts, of all blocks together.
    pub experts: usize,
    /// Those with fewer than [`FEW_TOKENS`].
    pub few: usize,
    /// The expert with the fewest tokens: its block, its number, and how many.
    pub least: (usize, usize, usize),
}

impl ExpertSpread {
    /// Returns that of some blocks; `None` if none has experts.
    pub fn of<'a>(blocks: impl IntoIterator<Item = &'a BlockReport>) -> Option<ExpertSpread> {
        let mut spread: Option<ExpertSpread> = None;
        for block in blocks {
            for (expert, &tokens) in block.expert_tokens.iter().enumerate() {
                let own = (block.layer, expert, tokens);
                let all = spread.get_or_insert(ExpertSpread {
                    experts: 0,
                    few: 0,
                    least: own,
                });
                all.experts += 1;
                all.few += usize::from(tokens < FEW_TOKENS);
                if tokens < all.least.2 {
                    all.least = own;
                }
            }
        }
        spread
    }

    /// Returns a warning that says what to do, if any expert has few tokens.
    pub fn warning(&self) -> Option<String> {
        let (layer, expert, tokens) = self.least;
        (self.few > 0).then(|| {
            format!(
                "{} of {} experts were given fewer than {FEW_TOKENS} calibration tokens, the least ({tokens}) expert {expert} of \
                 block {layer}: they are calibrated on a sample of all tokens too; use more samples, more varied text, or \
                 experts = \"all\"",
                self.few, self.experts
            )
        })
    }
}
