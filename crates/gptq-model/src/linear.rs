//! Linear layers on a device, dense or quantized.

use std::ops::Range;

use burn::tensor::{DType, Tensor};
use gptq_kernels::{Engine, PackedWeight};

/// `y = x wᵀ + bias`.
#[derive(Clone, Debug)]
pub struct Linear<B: Engine> {
    /// `[out, in]`.
    pub weight: Weight<B>,
    /// `[out]`, compute dtype.
    pub bias: Option<Tensor<B, 1>>,
}

/// Weights `[out, in]` on the device.
#[derive(Clone, Debug)]
pub enum Weight<B: Engine> {
    /// Weights in the compute dtype.
    Dense(Tensor<B, 2>),
    /// Packed codes; only where a backend multiplies with them ([`Engine::KEEPS_PACKED`]).
    Packed(PackedWeight<B>),
}

impl<B: Engine> Weight<B> {
    /// Returns the weights in `dtype`, the compute dtype; packed ones are dequantized.
    pub fn dense(&self, dtype: DType) -> Tensor<B, 2> {
        match self {
            Weight::Dense(weight) => weight.clone(),
            Weight::Packed(packed) => {
                B::dequantize_packed(&packed.download(), dtype, &packed.device())
            }
        }
    }
}

impl<B: Engine> Linear<B> {
    pub(crate) fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let y = match &self.weight {
            Weight::Dense(weight) => B::matmul_nt(x, weight.clone()),
            Weight::Packed(packed) => B::packed_matmul_nt(x, packed),
        };
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }
}

/// The outputs of linears of one shape, each for its own rows of `x`: consecutive ones, none of them empty, all of `x`
/// together.
pub(crate) fn forward_each<B: Engine>(
    linears: &[(&Linear<B>, Range<usize>)],
    x: Tensor<B, 2>,
) -> Tensor<B, 2> {
    let plain = linears.iter().map(|(linear, _)| match linear {
        Linear {
            weight: Weight::Dense(weight),
            bias: None,
        } => Some(weight.clone()),
        _ => None,
    });
    let plain: Option<Vec<_>> = plain.collect();
    if let Some(weights) = plain {
        let mut starts = vec![0];
        starts.extend(linears.iter().map(|(_, rows)| rows.end));
        return B::matmul_nt_each(x, &starts, weights);
    }
    let outputs = linears
        .iter()
        .map(|(linear, rows)| linear.forward(x.clone().narrow(0, rows.start, rows.len())));
    Tensor::cat(outputs.collect(), 0)
}
