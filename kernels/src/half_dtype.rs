//! The 16-bit floats as Burn's dtypes.

use burn::tensor::DType;
use gptq_format::Half;

/// Converts a 16-bit float to Burn's dtype.
pub fn dtype(half: Half) -> DType {
    match half {
        Half::F16 => DType::F16,
        Half::Bf16 => DType::BF16,
    }
}

/// The inverse of [`dtype`].
pub fn half_of(dtype: DType) -> Half {
    match dtype {
        DType::BF16 => Half::Bf16,
        _ => Half::F16,
    }
}
