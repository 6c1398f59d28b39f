//! One linear as integers, before and after packing.
//!
//! `w_hat[o, i] = scales[g_idx[i], o] * (codes[i, o] - zeros[g_idx[i], o])`

use half::f16;

use crate::{
    Bits, CheckpointFormat, FormatError, pack_across, pack_down, unpack_across, unpack_down,
};

/// A quantized linear, one byte per code.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedLinear {
    /// Code width.
    pub bits: Bits,
    /// Inputs.
    pub in_features: usize,
    /// Outputs.
    pub out_features: usize,
    /// `[in, out]`, each below `2^bits`.
    pub codes: Vec<u8>,
    /// `[groups, out]`.
    pub scales: Vec<f16>,
    /// `[groups, out]`, true zero points.
    pub zeros: Vec<u8>,
    /// `[in]`, the group of each input row.
    pub g_idx: Vec<i32>,
}

/// A quantized linear as its four tensors on disk.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedLinear {
    /// Code width.
    pub bits: Bits,
    /// Inputs.
    pub in_features: usize,
    /// Outputs.
    pub out_features: usize,
    /// How `qzeros` is stored.
    pub format: CheckpointFormat,
    /// `[in * bits / 32, out]`.
    pub qweight: Vec<u32>,
    /// `[groups, out * bits / 32]`.
    pub qzeros: Vec<u32>,
    /// `[groups, out]`.
    pub scales: Vec<f16>,
    /// `[in]`.
    pub g_idx: Vec<i32>,
}

impl QuantizedLinear {
    /// Groups per row.
    pub fn groups(&self) -> usize {
        self.scales.len() / self.out_features
    }

    /// The weights the codes stand for, `[out, in]` f32 (each product is one f32 rounding).
    #[expect(
        clippy::indexing_slicing,
        reason = "the innermost loop; shapes and g_idx are checked where a linear is read"
    )]
    pub fn dequantize(&self) -> Vec<f32> {
        let (n_in, n_out) = (self.in_features, self.out_features);
        let scales: Vec<f32> = self.scales.iter().map(|s| s.to_f32()).collect();
        let mut weight = vec![0f32; n_in * n_out];
        for (o, row) in weight.chunks_exact_mut(n_in).enumerate() {
            for (i, w) in row.iter_mut().enumerate() {
                let g = self.g_idx[i] as usize * n_out + o;
                let code = i32::from(self.codes[i * n_out + o]) - i32::from(self.zeros[g]);
                *w = scales[g] * code as f32;
            }
        }
        weight
    }

    /// Packs into AutoGPTQ's layout.
    ///
    /// Errors with [`FormatError::Unpackable`] unless both dimensions are multiples of 32, and with
    /// [`FormatError::ZeroPointZero`] where v1 cannot store a zero point.
    pub fn pack(&self, format: CheckpointFormat) -> Result<PackedLinear, FormatError> {
        let (n_in, n_out) = (self.in_features, self.out_features);
        if n_in % 32 != 0 || n_out % 32 != 0 {
            return Err(FormatError::Unpackable {
                in_features: n_in,
                out_features: n_out,
            });
        }
        let stored_zeros = self
            .zeros
            .iter()
            .map(|zero| zero.checked_sub(format.zero_offset()))
            .collect::<Option<Vec<u8>>>()
            .ok_or(FormatError::ZeroPointZero)?;
        Ok(PackedLinear {
            bits: self.bits,
            in_features: n_in,
            out_features: n_out,
            format,
            qweight: pack_down(&self.codes, n_in, n_out, self.bits),
            qzeros: pack_across(&stored_zeros, self.groups(), n_out, self.bits),
            scales: self.scales.clone(),
            g_idx: self.g_idx.clone(),
        })
    }
}

impl PackedLinear {
    /// Reads codes and zeros back; lengths and `g_idx` were checked when the tensors were read.
    pub fn unpack(&self) -> QuantizedLinear {
        QuantizedLinear {
            bits: self.bits,
            in_features: self.in_features,
            out_features: self.out_features,
            codes: unpack_down(
                &self.qweight,
                self.in_features,
                self.out_features,
                self.bits,
            ),
            scales: self.scales.clone(),
            zeros: self.zeros(),
            g_idx: self.g_idx.clone(),
        }
    }

    /// True zero points, `[groups, out]`.
    pub fn zeros(&self) -> Vec<u8> {
        let groups = self.scales.len() / self.out_features;
        let offset = self.format.zero_offset();
        let max = self.bits.max_code();
        unpack_across(&self.qzeros, groups, self.out_features, self.bits)
            .into_iter()
            // A v1 file holding 2^b - 1 was written by a tool that let a zero of 0 wrap; every
            // reader masks it back to 0.
            .map(|stored| stored.wrapping_add(offset) & max)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny(zero: u8) -> QuantizedLinear {
        QuantizedLinear {
            bits: Bits::Four,
            in_features: 32,
            out_features: 32,
            codes: (0..32 * 32).map(|i| (i * 7 % 16) as u8).collect(),
            scales: (0..64)
                .map(|i| f16::from_f32(0.01 + i as f32 / 64.0))
                .collect(),
            zeros: vec![zero; 64],
            g_idx: (0..32).map(|i| i % 2).collect(),
        }
    }

    #[test]
    fn packing_and_unpacking_is_the_identity_in_both_formats() {
        for format in [CheckpointFormat::Gptq, CheckpointFormat::GptqV2] {
            let linear = tiny(8);
            assert_eq!(linear.pack(format).unwrap().unpack(), linear);
        }
    }

    #[test]
    fn v1_refuses_a_zero_point_of_zero_and_v2_takes_it() {
        assert!(matches!(
            tiny(0).pack(CheckpointFormat::Gptq),
            Err(FormatError::ZeroPointZero)
        ));
        let v2 = tiny(0).pack(CheckpointFormat::GptqV2).unwrap();
        assert_eq!(v2.unpack(), tiny(0));
    }

    #[test]
    fn dequantized_weights_follow_the_group_index() {
        let linear = tiny(8);
        let weight = linear.dequantize();
        let (o, i) = (5, 3);
        let expected = linear.scales[32 + o].to_f32() * (f32::from(linear.codes[i * 32 + o]) - 8.0);
        assert_eq!(weight[o * 32 + i], expected);
    }
}
