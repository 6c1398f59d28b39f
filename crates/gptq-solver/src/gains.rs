//! Gain of each option beyond plain GPTQ in a linear layer.

use serde::{Deserialize, Serialize};

/// Reduction of the loss by each option, relative to the linear layer's output energy `‖WX‖²`: the
/// unit of the relative error. `None` if the option was not used.
///
/// Each gain is measured at the step where the option acts, before later steps, so the gains do not
/// add up to the total difference. None is below zero by more than rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gains {
    /// Scale search: the loss of the plain grids when the grids were chosen, `Σ M_jj² (w_j -
    /// q_j)²`, minus that of the chosen ones.
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
    /// Refinement: reduction of `tr((W - Q) H (W - Q)ᵀ)` by its passes, with `H` damped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refine: Option<f64>,
}

impl Gains {
    /// Returns the options used, by their recipe names, and their gains.
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
