//! How a linear layer is to be quantised.

/// Settings of one linear layer's quantisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Bits per code: 2, 3, 4 or 8.
    pub bits: u32,
    /// Input columns per group; `None` for one group per output row.
    pub group_size: Option<usize>,
    /// Whether the zero point is fixed at `2^(bits - 1)`.
    pub symmetric: bool,
    /// Whether the groups' parameters come from the original weights in their original order.
    pub static_groups: bool,
}

impl Settings {
    /// The largest code, `2^bits - 1`.
    pub(crate) fn max_code(self) -> f32 {
        ((1_u32 << self.bits) - 1) as f32
    }

    /// Columns per group of a layer with this many input columns.
    pub(crate) fn group_columns(self, in_features: usize) -> usize {
        self.group_size.unwrap_or(in_features).min(in_features)
    }

    /// Groups per output row of a layer with this many input columns.
    pub(crate) fn groups(self, in_features: usize) -> usize {
        in_features.div_ceil(self.group_columns(in_features))
    }
}

/// What is stored for a zero point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroOffset {
    /// Zero point minus one: checkpoint format `gptq`.
    MinusOne,
    /// The zero point itself: checkpoint format `gptq_v2`.
    None,
}
