//! What each option beyond plain GPTQ gains in a linear.

use serde::{Deserialize, Serialize};

/// How much each option took off the loss that it lowers, as a part of the linear's output energy
/// `‖WX‖²`: the unit of the relative error. `None` where the option was not used.
///
/// Each is measured where the option acts, with what comes after it still to be done, so they do not add
/// up to the difference that they make together. None is below zero by more than rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gains {
    /// Searching scales: what the plain grids would have cost when they were chosen,
    /// `Σ M_jj² (w_j - q_j)²`, less what the chosen ones do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_search: Option<f64>,
    /// Correcting the mismatch of activations: `‖X_d Wᵀ - X Wᵀ‖²` less `‖X_d Wᵀ - X W'ᵀ‖²`, on the windows that it was
    /// measured on, nothing being rounded yet.
    #[serde(
        default,
        rename = "asymmetric",
        skip_serializing_if = "Option::is_none"
    )]
    pub mismatch_correction: Option<f64>,
    /// Refining: what its passes took off `tr((W - Q) H (W - Q)ᵀ)`, `H` damped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refine: Option<f64>,
}

impl Gains {
    /// The options used, by their names in a recipe, and what each gained.
    pub fn used(&self) -> impl Iterator<Item = (&'static str, f64)> + use<> {
        [
            ("scale_search", self.scale_search),
            ("mismatch_correction", self.mismatch_correction),
            ("refine", self.refine),
        ]
        .into_iter()
        .filter_map(|(name, gain)| Some((name, gain?)))
    }
}
