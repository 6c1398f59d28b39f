//! Code width and group size, the two settings that every crate shares.

use serde::{Deserialize, Serialize};

/// Width of a quantized code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Bits {
    /// 2 bits, codes 0..=3.
    Two,
    /// 3 bits, codes 0..=7.
    Three,
    /// 4 bits, codes 0..=15.
    Four,
    /// 8 bits, codes 0..=255.
    Eight,
}

impl Bits {
    /// Every width that the format supports.
    pub const ALL: [Bits; 4] = [Bits::Two, Bits::Three, Bits::Four, Bits::Eight];

    /// Returns the width in bits.
    pub fn get(self) -> usize {
        match self {
            Bits::Two => 2,
            Bits::Three => 3,
            Bits::Four => 4,
            Bits::Eight => 8,
        }
    }

    /// Returns the largest code, `2^bits - 1`.
    pub fn max_code(self) -> u8 {
        ((1u32 << self.get()) - 1) as u8
    }

    /// Returns the zero point of a symmetric quantizer, `2^(bits-1)`.
    pub fn symmetric_zero(self) -> u8 {
        1 << (self.get() - 1)
    }
}

impl TryFrom<u32> for Bits {
    type Error = String;

    fn try_from(value: u32) -> Result<Self, Self::Error> {
        Bits::ALL
            .into_iter()
            .find(|b| b.get() == value as usize)
            .ok_or_else(|| format!("bits = {value} is not one of 2, 3, 4, 8"))
    }
}

impl std::str::FromStr for Bits {
    type Err = String;

    /// Parses a width as users type it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let value: u32 = text
            .parse()
            .map_err(|_| format!("bits = {text} is not one of 2, 3, 4, 8"))?;
        Bits::try_from(value)
    }
}

impl From<Bits> for u32 {
    fn from(bits: Bits) -> u32 {
        bits.get() as u32
    }
}

impl std::fmt::Display for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.get().fmt(f)
    }
}

/// Number of consecutive input columns that share one scale and zero point.
///
/// On disk and in recipes [`GroupSize::Row`] is written `-1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub enum GroupSize {
    /// One group per output row.
    Row,
    /// This many columns per group; at least 1.
    Columns(usize),
}

impl GroupSize {
    /// Returns the columns per group for a linear layer with `in_features` inputs.
    pub fn columns(self, in_features: usize) -> usize {
        match self {
            GroupSize::Row => in_features,
            GroupSize::Columns(n) => n,
        }
    }

    /// Returns the groups per row for a linear layer with `in_features` inputs.
    pub fn groups(self, in_features: usize) -> usize {
        // Avoids a division by zero for a layer without inputs.
        in_features.div_ceil(self.columns(in_features).max(1))
    }

    /// Returns true if `in_features` columns split into whole groups.
    pub fn divides(self, in_features: usize) -> bool {
        in_features.is_multiple_of(self.columns(in_features))
    }
}

impl TryFrom<i64> for GroupSize {
    type Error = String;

    fn try_from(value: i64) -> Result<Self, Self::Error> {
        match value {
            -1 => Ok(GroupSize::Row),
            1.. => Ok(GroupSize::Columns(value as usize)),
            _ => Err(format!("group_size = {value} is neither -1 nor positive")),
        }
    }
}

impl std::str::FromStr for GroupSize {
    type Err = String;

    /// Parses a number of columns, or -1, as users type it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let value: i64 = text
            .parse()
            .map_err(|_| format!("group_size = {text} is neither -1 nor positive"))?;
        GroupSize::try_from(value)
    }
}

impl From<GroupSize> for i64 {
    fn from(size: GroupSize) -> i64 {
        match size {
            GroupSize::Row => -1,
            GroupSize::Columns(n) => n as i64,
        }
    }
}

impl std::fmt::Display for GroupSize {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        i64::from(*self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_four_widths_parse() {
        for n in 0..=64u32 {
            assert_eq!(Bits::try_from(n).is_ok(), [2, 3, 4, 8].contains(&n), "{n}");
        }
    }

    #[test]
    fn minus_one_is_the_whole_row() {
        let size = GroupSize::try_from(-1).unwrap();
        assert_eq!((size.columns(768), size.groups(768)), (768, 1));
        assert!(GroupSize::try_from(0).is_err());
        assert!(GroupSize::try_from(-2).is_err());
        assert!(!GroupSize::Columns(128).divides(320));
        assert_eq!(size.groups(0), 0);
    }
}
