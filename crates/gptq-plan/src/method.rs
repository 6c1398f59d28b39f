//! Options for finding codes and scales. They do not affect the file format.

use gptq_format::Bits;
use serde::{Deserialize, Serialize};

/// A named set of options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Exactly AutoGPTQ's method: every scale just spans its group.
    Autogptq,
    /// A scale search, at almost no cost.
    Standard,
    /// All options that improve accuracy without gradients.
    #[default]
    Best,
    /// All of these, then codes and scales tuned block by block.
    Tuned,
}

/// Steps of tuning in each block with [`Preset::Tuned`].
const TUNING_STEPS: usize = 60;

impl Preset {
    /// Returns its name in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Preset::Autogptq => "autogptq",
            Preset::Standard => "standard",
            Preset::Best => "best",
            Preset::Tuned => "tuned",
        }
    }

    /// Returns its options at a code width.
    pub fn method(self, bits: Bits) -> Method {
        match self {
            Preset::Autogptq => Method::default(),
            Preset::Standard => Method {
                scale_search: true,
                ..Method::default()
            },
            Preset::Best => Method {
                scale_search: true,
                // At 4 bits and more it gains next to nothing (`crates/gptq-solver/ACCURACY.md`).
                refine: usize::from(matches!(bits, Bits::Two | Bits::Three)),
                mismatch_correction: 1.0,
                ..Method::default()
            },
            Preset::Tuned => Method {
                refine: 1,
                tune: TUNING_STEPS,
                ..Preset::Best.method(bits)
            },
        }
    }
}

/// The options beyond plain GPTQ; by default, none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Method {
    /// Search each scale for the least error, weighted by the solver's cost.
    pub scale_search: bool,
    /// Passes of coordinate descent over the codes after the sweep.
    pub refine: usize,
    /// Strength, 0 to 1, of the activation-mismatch correction: before they are rounded, weights are moved to
    /// where they give the dense model's output on the branch's own inputs.
    #[serde(rename = "asymmetric")]
    pub mismatch_correction: f64,
    /// Steps of tuning: once a block is solved, its codes and scales follow the gradient of the distance to the
    /// dense block's output.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tune: usize,
    /// The tokens that experts are calibrated on.
    #[serde(default, skip_serializing_if = "ExpertTokens::are_routed")]
    pub experts: ExpertTokens,
}

/// Tokens that the experts of a mixture are calibrated on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExpertTokens {
    /// Those that the router gives each, and a sample of all where these are few.
    #[default]
    Routed,
    /// All of them, for every expert.
    All,
}

impl ExpertTokens {
    /// True for the default, as in files from before there was another.
    fn are_routed(&self) -> bool {
        *self == ExpertTokens::Routed
    }
}

/// True if there is none, as in files from before there was tuning.
fn is_zero(steps: &usize) -> bool {
    *steps == 0
}

impl Method {
    /// True if the method needs the dense model's activations beside the branch's own.
    pub fn corrects_mismatch(&self) -> bool {
        self.mismatch_correction > 0.0
    }

    /// True if the dense model is run beside the branch.
    pub fn needs_dense(&self) -> bool {
        self.corrects_mismatch() || self.tune > 0
    }
}
