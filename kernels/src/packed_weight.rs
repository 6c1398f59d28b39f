//! A quantised linear's four tensors on a device, still packed as they are on disk.
//!
//! `w[o, i] = scales[g, o] (code[i, o] - zero[g, o])` with `g = g_idx[i]`; `gptq-format` has the layout
//! of codes and zeros in words.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_format::{Bits, CheckpointFormat, PackedLinear};
use half::f16;

/// Packed weights `[out, in]`. Cloning shares the tensors.
#[derive(Clone, Debug)]
pub struct PackedWeight<B: Backend> {
    /// Code width.
    pub bits: Bits,
    /// How `qzeros` is stored.
    pub format: CheckpointFormat,
    /// i32 `[in * bits / 32, out]`.
    pub qweight: Tensor<B, 2, Int>,
    /// i32 `[groups, out * bits / 32]`.
    pub qzeros: Tensor<B, 2, Int>,
    /// f16 `[groups, out]`.
    pub scales: Tensor<B, 2>,
    /// i32 `[in]`, each below `groups`.
    pub g_idx: Tensor<B, 1, Int>,
    /// i32 `[in]`: the input column of each position of `qweight`, where an engine reordered it.
    pub order: Option<Tensor<B, 1, Int>>,
}

impl<B: Backend> PackedWeight<B> {
    /// Puts the tensors on a device. The lengths and `g_idx` were checked when they were read.
    pub fn upload(packed: &PackedLinear, device: &B::Device) -> Self {
        let (n_out, groups) = (
            packed.out_features,
            packed.scales.len() / packed.out_features,
        );
        let ints = |words: &[u32], shape: [usize; 2]| {
            let words: Vec<i32> = words.iter().map(|&w| w as i32).collect();
            Tensor::from_data(TensorData::new(words, shape), (device, DType::I32))
        };
        let words_out = packed.qzeros.len() / groups;
        let words_in = packed.qweight.len() / n_out;
        PackedWeight {
            bits: packed.bits,
            format: packed.format,
            qweight: ints(&packed.qweight, [words_in, n_out]),
            qzeros: ints(&packed.qzeros, [groups, words_out]),
            scales: Tensor::from_data(
                TensorData::new(packed.scales.clone(), [groups, n_out]),
                (device, DType::F16),
            ),
            g_idx: Tensor::from_data(
                TensorData::new(packed.g_idx.clone(), [packed.in_features]),
                (device, DType::I32),
            ),
            order: None,
        }
    }

    /// The tensors on the host; waits for the device.
    pub fn download(&self) -> PackedLinear {
        let words = |tensor: &Tensor<B, 2, Int>| ints(tensor.clone().into_data());
        let unsigned = |values: Vec<i32>| values.into_iter().map(|v| v as u32).collect();
        let packed = PackedLinear {
            bits: self.bits,
            in_features: self.g_idx.dims()[0],
            out_features: self.qweight.dims()[1],
            format: self.format,
            qweight: unsigned(words(&self.qweight)),
            qzeros: unsigned(words(&self.qzeros)),
            scales: (self.scales.clone().into_data())
                .to_vec::<f16>()
                .expect("scales are f16"),
            g_idx: ints(self.g_idx.clone().into_data()),
        };
        let Some(order) = &self.order else {
            return packed;
        };
        let n_out = packed.out_features;
        let mut linear = packed.unpack();
        let reordered = linear.codes.clone();
        let order = ints(order.clone().into_data());
        for (row, column) in reordered.chunks(n_out).zip(order) {
            linear.codes[column as usize * n_out..][..n_out].copy_from_slice(row);
        }
        linear
            .pack(packed.format)
            .expect("zero points that were packed before")
    }
}

fn ints(data: TensorData) -> Vec<i32> {
    data.to_vec::<i32>().expect("packed words are i32")
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tolerance;
    use gptq_format::QuantizedLinear;

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
        let packed = linear.pack(CheckpointFormat::Gptq).unwrap();
        let device = Default::default();
        let weight = PackedWeight::<Cpu>::upload(&packed, &device);
        assert_eq!(weight.download(), packed);

        let x: Vec<f32> = (0..2 * n_in).map(|i| (i % 13) as f32 - 6.0).collect();
        let x = Tensor::<Cpu, 2>::from_data(TensorData::new(x, [2, n_in]), (&device, DType::F32));
        let dense = TensorData::new(linear.dequantise(), [n_out, n_in]);
        let dense = Tensor::<Cpu, 2>::from_data(dense, (&device, DType::F32));
        let found = Cpu::packed_matmul_nt(x.clone(), &weight).into_data();
        let expected = Cpu::matmul_nt(x, dense).into_data();
        found.assert_approx_eq::<f32>(&expected, Tolerance::default());
    }
}
