//! A quantized linear on a device, its codes still packed.
//!
//! `w[o, i] = scale[g, o] (code[i, o] - zero[g, o])` with `g = g_idx[i]`; `gptq-format` has the layout
//! of codes in words.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_format::{Bits, PackedLinear, QuantizedLinear};
use half::f16;

/// Packed weights `[out, in]`. Cloning shares the tensors.
#[derive(Clone, Debug)]
pub struct PackedWeight<B: Backend> {
    /// Code width.
    pub bits: Bits,
    /// The tensors.
    pub layout: PackedLayout<B>,
}

/// Layout of codes, scales and zero points.
#[derive(Clone, Debug)]
pub enum PackedLayout<B: Backend> {
    /// The layout of [`PackedLinear`].
    Columns {
        /// i32 `[in * bits / 32, out]`.
        codes: Tensor<B, 2, Int>,
        /// f16 `[groups, out]`.
        scales: Tensor<B, 2>,
        /// u8 `[groups, out]`.
        zeros: Tensor<B, 2, Int>,
        /// i32 `[in]`, each below `groups`.
        g_idx: Tensor<B, 1, Int>,
    },
    /// The codes of one output row next to each other, a group's columns too: for 2, 4 and 8 bits, where
    /// a group is a whole number of 16-byte runs.
    Rows {
        /// i32 `[out, in * bits / 32]`, the first code of a word in its lowest bits.
        codes: Tensor<B, 2, Int>,
        /// i32 `[out, groups]`: the scale's f16 bits, and above them the zero point.
        grid: Tensor<B, 2, Int>,
        /// i32 `[in]`: the input column of each position.
        order: Tensor<B, 1, Int>,
    },
}

impl<B: Backend> PackedWeight<B> {
    /// Puts the tensors on a device as they are. The lengths and `g_idx` were checked when they were
    /// read.
    pub fn upload(packed: &PackedLinear, device: &B::Device) -> Self {
        let (n_out, groups) = (packed.out_features, packed.groups());
        let words: Vec<i32> = packed.codes.iter().map(|&word| word as i32).collect();
        let rows = words.len() / n_out;
        PackedWeight {
            bits: packed.bits,
            layout: PackedLayout::Columns {
                codes: Tensor::from_data(
                    TensorData::new(words, [rows, n_out]),
                    (device, DType::I32),
                ),
                scales: Tensor::from_data(
                    TensorData::new(packed.scales.clone(), [groups, n_out]),
                    (device, DType::F16),
                ),
                zeros: Tensor::from_data(
                    TensorData::new(packed.zeros.clone(), [groups, n_out]),
                    (device, DType::U8),
                ),
                g_idx: Tensor::from_data(
                    TensorData::new(packed.g_idx.clone(), [packed.in_features]),
                    (device, DType::I32),
                ),
            },
        }
    }

    /// `[out, in]`.
    pub fn dims(&self) -> [usize; 2] {
        match &self.layout {
            PackedLayout::Columns { codes, g_idx, .. } => [codes.dims()[1], g_idx.dims()[0]],
            PackedLayout::Rows { codes, order, .. } => [codes.dims()[0], order.dims()[0]],
        }
    }

    /// Returns the device that holds the tensors.
    pub fn device(&self) -> B::Device {
        match &self.layout {
            PackedLayout::Columns { codes, .. } | PackedLayout::Rows { codes, .. } => {
                codes.device()
            }
        }
    }

    /// The linear on the host; waits for the device.
    pub fn download(&self) -> PackedLinear {
        let [out_features, in_features] = self.dims();
        match &self.layout {
            PackedLayout::Columns {
                codes,
                scales,
                zeros,
                g_idx,
            } => PackedLinear {
                bits: self.bits,
                in_features,
                out_features,
                codes: words(codes),
                scales: (scales.clone().into_data())
                    .into_vec::<f16>()
                    .expect("scales are f16"),
                zeros: (zeros.clone().into_data())
                    .into_vec::<u8>()
                    .expect("zero points are u8"),
                g_idx: ints(g_idx.clone().into_data()),
            },
            PackedLayout::Rows { codes, grid, order } => {
                let order = ints(order.clone().into_data());
                self.columns(&words(codes), &words(grid), &order)
            }
        }
    }

    /// Undoes [`PackedLayout::Rows`].
    fn columns(&self, codes: &[u32], grid: &[u32], order: &[i32]) -> PackedLinear {
        let [n_out, n_in] = self.dims();
        let groups = grid.len() / n_out;
        let (bits, max) = (self.bits.get(), self.bits.max_code());
        let mut linear = QuantizedLinear {
            bits: self.bits,
            in_features: n_in,
            out_features: n_out,
            codes: vec![0; n_in * n_out],
            scales: vec![f16::ZERO; groups * n_out],
            zeros: vec![0; groups * n_out],
            g_idx: vec![0; n_in],
        };
        for (position, &column) in order.iter().enumerate() {
            let column = column as usize;
            linear.g_idx[column] = (position / (n_in / groups)) as i32;
            let bit = position * bits;
            for row in 0..n_out {
                let word = codes[row * (n_in * bits / 32) + bit / 32];
                linear.codes[column * n_out + row] = (word >> (bit % 32)) as u8 & max;
            }
        }
        for (at, cell) in grid.iter().enumerate() {
            let to = at % groups * n_out + at / groups;
            linear.scales[to] = f16::from_bits(*cell as u16);
            linear.zeros[to] = (cell >> 16) as u8;
        }
        linear.pack()
    }
}

fn words<B: Backend>(tensor: &Tensor<B, 2, Int>) -> Vec<u32> {
    let values = ints(tensor.clone().into_data());
    values.into_iter().map(|word| word as u32).collect()
}

fn ints(data: TensorData) -> Vec<i32> {
    data.to_vec::<i32>().expect("packed words are i32")
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tolerance;

    use super::*;
    use crate::{Cpu, Engine};

    #[test]
    fn packed_weights_multiply_as_the_weights_they_stand_for() {
        let (n_in, n_out) = (64, 32);
        let linear = QuantizedLinear {
            bits: Bits::Three,
            in_features: n_in,
            out_features: n_out,
            codes: (0..n_in * n_out).map(|i| (i * 5 % 8) as u8).collect(),
            scales: (0..2 * n_out)
                .map(|i| f16::from_f32(0.01 + i as f32 / 256.0))
                .collect(),
            zeros: vec![4; 2 * n_out],
            g_idx: (0..n_in as i32).map(|i| i % 2).collect(),
        };
        let packed = linear.pack();
        let device = Default::default();
        let weight = PackedWeight::<Cpu>::upload(&packed, &device);
        assert_eq!(weight.download(), packed);

        let x: Vec<f32> = (0..2 * n_in).map(|i| (i % 13) as f32 - 6.0).collect();
        let x = Tensor::<Cpu, 2>::from_data(TensorData::new(x, [2, n_in]), (&device, DType::F32));
        let dense = TensorData::new(linear.dequantize(), [n_out, n_in]);
        let dense = Tensor::<Cpu, 2>::from_data(dense, (&device, DType::F32));
        let found = Cpu::packed_matmul_nt(x.clone(), &weight).into_data();
        let expected = Cpu::matmul_nt(x, dense).into_data();
        found.assert_approx_eq::<f32>(&expected, Tolerance::default());
    }
}
