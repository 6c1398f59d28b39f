//! One linear as integers on a device: what a solve gives, before any file or layout.
//!
//! `w[o, i] = scales[g, o] (codes[i, o] - zeros[g, o])` with `g = g_idx[i]`.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_format::{Bits, QuantizedLinear};
use half::f16;

/// Codes and grids of one linear. Cloning shares the tensors.
#[derive(Clone, Debug)]
pub struct Codes<B: Backend> {
    /// Code width.
    pub bits: Bits,
    /// u8 `[in, out]`, inputs in their original order, each below `2^bits`.
    pub codes: Tensor<B, 2, Int>,
    /// f16 `[groups, out]`.
    pub scales: Tensor<B, 2>,
    /// u8 `[groups, out]`, true zero points.
    pub zeros: Tensor<B, 2, Int>,
    /// `[in]`, the group of each input, on the host.
    pub g_idx: Vec<i32>,
}

impl<B: Backend> Codes<B> {
    /// Puts a linear on a device.
    pub fn upload(linear: QuantizedLinear, device: &B::Device) -> Self {
        let (n_in, n_out, groups) = (linear.in_features, linear.out_features, linear.groups());
        let bytes = |values: Vec<u8>, rows: usize| {
            let data = TensorData::new(values, [rows, n_out]);
            Tensor::from_data(data, (device, DType::U8))
        };
        let scales = TensorData::new(linear.scales, [groups, n_out]);
        Codes {
            bits: linear.bits,
            codes: bytes(linear.codes, n_in),
            scales: Tensor::from_data(scales, (device, DType::F16)),
            zeros: bytes(linear.zeros, groups),
            g_idx: linear.g_idx,
        }
    }

    /// The linear on the host; waits for the device.
    pub fn download(self) -> QuantizedLinear {
        let [in_features, out_features] = self.codes.dims();
        let bytes = |tensor: Tensor<B, 2, Int>| {
            let data = tensor.into_data();
            data.into_vec::<u8>().expect("codes and zero points are u8")
        };
        QuantizedLinear {
            bits: self.bits,
            in_features,
            out_features,
            codes: bytes(self.codes),
            scales: (self.scales.into_data())
                .into_vec::<f16>()
                .expect("scales are f16"),
            zeros: bytes(self.zeros),
            g_idx: self.g_idx,
        }
    }
}
