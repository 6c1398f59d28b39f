//! One linear as integers, apart from any file: a byte for each code, or the codes in words.
//!
//! `w_hat[o, i] = scales[g_idx[i], o] * (codes[i, o] - zeros[g_idx[i], o])`

use half::f16;

use crate::{Bits, pack_down, unpack_down};

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

/// A quantized linear with its codes in words: what solvers give, what formats encode and decode, and what is put on
/// a device.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedLinear {
    /// Code width.
    pub bits: Bits,
    /// Inputs, a multiple of 32.
    pub in_features: usize,
    /// Outputs.
    pub out_features: usize,
    /// `[in * bits / 32, out]`, packed down the inputs ([`pack_down`]).
    pub codes: Vec<u32>,
    /// `[groups, out]`.
    pub scales: Vec<f16>,
    /// `[groups, out]`, true zero points, each below `2^bits`.
    pub zeros: Vec<u8>,
    /// `[in]`, the group of each input row.
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

    /// Packs the codes into words. The inputs must be a multiple of 32 (asserted).
    pub fn pack(&self) -> PackedLinear {
        PackedLinear {
            bits: self.bits,
            in_features: self.in_features,
            out_features: self.out_features,
            codes: pack_down(&self.codes, self.in_features, self.out_features, self.bits),
            scales: self.scales.clone(),
            zeros: self.zeros.clone(),
            g_idx: self.g_idx.clone(),
        }
    }
}

impl PackedLinear {
    /// Groups per row.
    pub fn groups(&self) -> usize {
        self.scales.len() / self.out_features
    }

    /// Reads the codes back; lengths and `g_idx` were checked when the tensors were read.
    pub fn unpack(&self) -> QuantizedLinear {
        QuantizedLinear {
            bits: self.bits,
            in_features: self.in_features,
            out_features: self.out_features,
            codes: unpack_down(&self.codes, self.in_features, self.out_features, self.bits),
            scales: self.scales.clone(),
            zeros: self.zeros.clone(),
            g_idx: self.g_idx.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> QuantizedLinear {
        QuantizedLinear {
            bits: Bits::Four,
            in_features: 32,
            out_features: 24,
            codes: (0..32 * 24).map(|i| (i * 7 % 16) as u8).collect(),
            scales: (0..48)
                .map(|i| f16::from_f32(0.01 + i as f32 / 64.0))
                .collect(),
            zeros: vec![8; 48],
            g_idx: (0..32).map(|i| i % 2).collect(),
        }
    }

    #[test]
    fn packing_and_unpacking_is_the_identity() {
        assert_eq!(tiny().pack().unpack(), tiny());
    }

    #[test]
    fn dequantized_weights_follow_the_group_index() {
        let linear = tiny();
        let weight = linear.dequantize();
        let (o, i) = (5, 3);
        let expected = linear.scales[24 + o].to_f32() * (f32::from(linear.codes[i * 24 + o]) - 8.0);
        assert_eq!(weight[o * 32 + i], expected);
    }
}
