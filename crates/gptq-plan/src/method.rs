//! Options for finding codes and scales. They do not affect the file format.

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
}

impl Preset {
    /// Returns its name in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Preset::Autogptq => "autogptq",
            Preset::Standard => "standard",
            Preset::Best => "best",
        }
    }

    /// Returns its options.
    pub fn method(self) -> Method {
        match self {
            Preset::Autogptq => Method::default(),
            Preset::Standard => Method {
                scale_search: true,
                ..Method::default()
            },
            Preset::Best => Method {
                scale_search: true,
                refine: 1,
                mismatch_correction: 1.0,
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
}

impl Method {
    /// True if the method needs the dense model's activations beside the branch's own.
    pub fn corrects_mismatch(&self) -> bool {
        self.mismatch_correction > 0.0
    }
}
