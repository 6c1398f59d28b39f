//! A quantized linear's shape and settings: what sizes and readers' rules depend on.

use crate::{Bits, GroupSize};

/// One quantized linear, as far as sizes and readers' rules depend on it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinearShape {
    /// Inputs.
    pub in_features: usize,
    /// Outputs.
    pub out_features: usize,
    /// Code width.
    pub bits: Bits,
    /// Columns per group.
    pub group_size: GroupSize,
}

impl LinearShape {
    /// Groups per output.
    pub fn groups(&self) -> usize {
        self.group_size.groups(self.in_features)
    }

    /// Weights that the codes stand for.
    pub fn weights(&self) -> u64 {
        self.in_features as u64 * self.out_features as u64
    }
}
