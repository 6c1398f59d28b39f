//! The settings that a size budget chooses from, and the choice for every linear layer.

use gptq_format::{Bits, GroupSize, LinearShape, OutputFormat};
use gptq_spec::LinearSpec;
use serde::{Deserialize, Serialize};

use crate::limits::{MAX_ENTRIES, MAX_KINDS, MAX_LAYERS, most, number};

/// A setting to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// Code width.
    pub bits: Bits,
    /// Columns per group.
    pub group_size: GroupSize,
}

/// Budget of a recipe.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Budget {
    /// Limit on the bits per weight.
    pub bits: f64,
    /// Distinct settings to choose from.
    pub choices: Vec<Choice>,
}

/// Mixed-precision allocation of a budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Allocation {
    /// Limit on the bits per weight.
    pub budget_bits: f64,
    /// Bits per weight of all quantized linear layers.
    pub mean_bits: f64,
    /// Settings to choose from.
    pub choices: Vec<Choice>,
    /// Linear layers with a common setting.
    pub groups: Vec<AllocatedGroup>,
}

/// Linear layers of one block that share their input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AllocatedGroup {
    /// Block index.
    pub layer: usize,
    /// Names within the block.
    pub linears: Vec<String>,
    /// Effect of each choice on the block's output, averaged over tokens, if only these layers have
    /// it: `‖ŷ - y‖² / ‖y‖²` on the dense model's states. `None` if it does not fit their shape.
    pub losses: Vec<Option<f64>>,
    /// Index of the chosen setting.
    pub choice: usize,
}

impl Allocation {
    /// Returns the number of linear layers per choice, in the choices' order, without unused
    /// choices.
    pub fn counts(&self) -> Vec<(Choice, usize)> {
        let given = |at: usize| {
            let groups = self.groups.iter().filter(move |group| group.choice == at);
            groups.map(|group| group.linears.len()).sum()
        };
        let choices = self.choices.iter().enumerate();
        let counts = choices.map(|(at, choice)| (*choice, given(at)));
        counts.filter(|(_, linears)| *linears > 0).collect()
    }

    /// Checks that its numbers are in the range of a plan's.
    ///
    /// # Errors
    /// Describes the first field that is out of range.
    pub(crate) fn check(&self) -> Result<(), String> {
        number("budget.budget_bits", self.budget_bits)?;
        number("budget.mean_bits", self.mean_bits)?;
        most("budget.choices", self.choices.len(), MAX_ENTRIES)?;
        let groups = MAX_LAYERS * MAX_KINDS;
        most("budget.groups", self.groups.len(), groups)
    }
}

impl Budget {
    /// Returns the default width of overrides: the widest codes within the budget.
    pub(crate) fn width(&self) -> Bits {
        let within = Bits::ALL.into_iter().rev();
        let mut within = within.filter(|bits| bits.get() as f64 <= self.bits);
        within.next().unwrap_or(Bits::Two)
    }
}

impl Choice {
    /// Returns the bits of a linear layer with this setting in `format`.
    pub(crate) fn stored_bits(self, linear: &LinearSpec, format: &dyn OutputFormat) -> u64 {
        let stored = LinearShape {
            in_features: linear.in_features,
            out_features: linear.out_features,
            bits: self.bits,
            group_size: self.group_size,
        };
        format.stored_bits(&stored)
    }
}
