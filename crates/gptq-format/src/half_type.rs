//! The two 16-bit floats used for weights.

use std::fmt;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};

/// A 16-bit float: f16 has 11 significant bits and ends at 65504, bf16 has 8 and the range of f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Half {
    /// IEEE binary16.
    #[default]
    #[serde(rename = "f16", alias = "float16")]
    F16,
    /// The upper half of an f32.
    #[serde(rename = "bf16", alias = "bfloat16")]
    Bf16,
}

impl Half {
    /// Returns the dtype of tensors on disk.
    pub fn dtype(self) -> Dtype {
        match self {
            Half::F16 => Dtype::F16,
            Half::Bf16 => Dtype::BF16,
        }
    }

    /// Returns the name used in `config.json`.
    pub fn torch_name(self) -> &'static str {
        match self {
            Half::F16 => "float16",
            Half::Bf16 => "bfloat16",
        }
    }

    /// Returns the largest finite value.
    pub fn largest(self) -> f64 {
        match self {
            Half::F16 => f16::MAX.to_f64(),
            Half::Bf16 => bf16::MAX.to_f64(),
        }
    }

    /// Returns true if these bits are infinite or NaN: all bits of the exponent are set.
    pub(crate) fn is_not_finite(self, bits: u16) -> bool {
        let exponent = match self {
            Half::F16 => 0x7c00,
            Half::Bf16 => 0x7f80,
        };
        bits & exponent == exponent
    }

    /// Rounds to nearest even.
    ///
    /// # Panics
    /// The lengths differ.
    pub(crate) fn round(self, from: &[f32], to: &mut [u16]) {
        match self {
            Half::F16 => (to.reinterpret_cast_mut::<f16>()).convert_from_f32_slice(from),
            Half::Bf16 => (to.reinterpret_cast_mut::<bf16>()).convert_from_f32_slice(from),
        }
    }
}

impl fmt::Display for Half {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Half::F16 => "f16",
            Half::Bf16 => "bf16",
        })
    }
}
