//! What a quantized linear takes on the disk, from its shape and settings alone.

use safetensors::Dtype;

use crate::{Bits, GroupSize, TensorSpec};

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
    /// The four tensors of `module`: `qweight`, `qzeros`, `scales`, `g_idx`.
    pub fn tensors(&self, module: &str) -> [TensorSpec; 4] {
        let (n_in, n_out, bits) = (self.in_features, self.out_features, self.bits.get());
        let groups = self.group_size.groups(n_in);
        let spec = |name: &str, dtype, shape: &[usize]| TensorSpec {
            name: format!("{module}.{name}"),
            dtype,
            shape: shape.into(),
        };
        [
            spec("qweight", Dtype::I32, &[n_in * bits / 32, n_out]),
            spec("qzeros", Dtype::I32, &[groups, n_out * bits / 32]),
            spec("scales", Dtype::F16, &[groups, n_out]),
            spec("g_idx", Dtype::I32, &[n_in]),
        ]
    }

    /// Bits of those tensors together.
    pub fn stored_bits(&self) -> u64 {
        let bytes = self
            .tensors("")
            .iter()
            .map(TensorSpec::bytes)
            .sum::<usize>();
        8 * bytes as u64
    }

    /// Weights that they stand for.
    pub fn weights(&self) -> u64 {
        self.in_features as u64 * self.out_features as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_bits_are_codes_zeros_scales_and_indices() {
        let linear = |bits, group_size| LinearShape {
            in_features: 4096,
            out_features: 11008,
            bits,
            group_size,
        };
        let weights = 4096 * 11008;
        let four = linear(Bits::Four, GroupSize::Columns(128));
        assert_eq!(four.weights(), weights);
        assert_eq!(
            four.stored_bits(),
            4 * weights + 32 * 11008 * (16 + 4) + 4096 * 32
        );
        let row = linear(Bits::Three, GroupSize::Row);
        assert_eq!(
            row.stored_bits(),
            3 * weights + 11008 * (16 + 3) + 4096 * 32
        );
    }
}
