//! How codes and scales are found. The format is the same whatever is chosen.

use gptq_format::Bits;
use serde::{Deserialize, Serialize};

/// A named choice of [`Method`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Exactly AutoGPTQ's method: every scale just spans its group.
    Autogptq,
    /// What pays at no real cost.
    #[default]
    Standard,
    /// All that pays.
    Best,
}

impl Preset {
    /// Its name in recipes and reports.
    pub fn name(self) -> &'static str {
        match self {
            Preset::Autogptq => "autogptq",
            Preset::Standard => "standard",
            Preset::Best => "best",
        }
    }

    /// What it stands for at a code width.
    pub fn method(self, bits: Bits) -> Method {
        match self {
            Preset::Autogptq => Method::default(),
            Preset::Standard => Method {
                scale_search: true,
                ..Method::default()
            },
            Preset::Best => Method {
                scale_search: true,
                // From 4 bits on it gains nothing (`crates/gptq-solver/ACCURACY.md`).
                refine: usize::from(matches!(bits, Bits::Two | Bits::Three)),
                asymmetric: 1.0,
            },
        }
    }
}

/// The options beyond plain GPTQ; by default, none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Method {
    /// Each scale searched for the least error, weighted by what the solver pays for it.
    pub scale_search: bool,
    /// Passes of coordinate descent over the codes after the sweep.
    pub refine: usize,
    /// Strength, 0 to 1, with which weights make up for the drift of their inputs from the dense
    /// model's, before they are rounded.
    pub asymmetric: f64,
}
