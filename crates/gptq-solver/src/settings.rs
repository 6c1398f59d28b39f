//! Settings of the solver, and its number types.

use gptq_format::{Bits, GroupSize};
use half::f16;
use nalgebra::RealField;

/// Settings of one linear layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Code width.
    pub bits: Bits,
    /// Columns per scale.
    pub group_size: GroupSize,
    /// Zero point fixed at `2^(bits-1)`; otherwise from the group's minimum.
    pub sym: bool,
    /// Groups are runs of *original* columns with parameters from the original weights; otherwise
    /// they are runs of columns in solving order, with parameters from the weights as updated by
    /// the panels before.
    pub static_groups: bool,
    /// Search each group's scale for the least rounding error, weighted by the cost of an error in
    /// each column; otherwise the grid just spans the group, as in AutoGPTQ.
    pub scale_search: bool,
    /// Round each scale to f16 before it is used. Loaders multiply by the f16 value, so this is off
    /// only for comparisons with AutoGPTQ, which rounds afterwards.
    pub f16_scales: bool,
    /// Passes of coordinate descent over the codes after the sweep; see [`refine`](crate::refine()).
    pub refine: usize,
}

impl Settings {
    /// Returns the number of columns the sweep processes at once.
    ///
    /// 128 as in AutoGPTQ, shortened to whole groups; a group longer than that is one panel, since
    /// its parameters need all of its columns up to date.
    pub(crate) fn panel(&self, in_features: usize, block: usize) -> usize {
        match self.group_size {
            GroupSize::Columns(g) if !self.static_groups && g <= block => block / g * g,
            GroupSize::Columns(g) if !self.static_groups => g.min(in_features),
            _ => block,
        }
    }
}

/// Number type of the solver: f32 or f64.
pub trait Real: RealField + Copy {
    /// Converts from f64, rounding.
    fn of(value: f64) -> Self;
    /// Converts to f64, exactly.
    fn exact(self) -> f64;
    /// Rounds to the nearest integer, ties to even, as `torch.round` does.
    fn round_ties_even(self) -> Self;
    /// Rounds to the nearest f16; a positive value never becomes zero or infinite.
    fn to_scale(self) -> Self {
        let tiniest = f16::from_bits(1);
        let scale = f16::from_f64(self.exact()).clamp(tiniest, f16::MAX);
        Self::of(scale.to_f64())
    }
}

impl Real for f32 {
    fn of(value: f64) -> f32 {
        value as f32
    }
    fn exact(self) -> f64 {
        f64::from(self)
    }
    fn round_ties_even(self) -> f32 {
        f32::round_ties_even(self)
    }
}

impl Real for f64 {
    fn of(value: f64) -> f64 {
        value
    }
    fn exact(self) -> f64 {
        self
    }
    fn round_ties_even(self) -> f64 {
        f64::round_ties_even(self)
    }
}
