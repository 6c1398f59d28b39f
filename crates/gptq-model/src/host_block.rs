//! A decoder block's weights in host memory: what can be read while the device is busy with the
//! block before.

use burn::tensor::Tensor;
use gptq_format::{Checkpoint, FormatError, PackedLinear};
use gptq_kernels::Engine;
use half::f16;
use rayon::prelude::*;

use crate::{Block, Linear, ModelConfig, ModelError, Projection, model, rope};

/// One block, read and checked, not yet on a device.
pub struct HostBlock {
    config: ModelConfig,
    linears: Vec<HostLinear>,
    input_norm: Vec<f16>,
    post_norm: Vec<f16>,
}

struct HostLinear {
    /// `[out, in]`.
    shape: [usize; 2],
    weight: HostWeight,
    bias: Option<Vec<f16>>,
}

enum HostWeight {
    Dense(Vec<f16>),
    Packed(PackedLinear),
}

impl HostBlock {
    /// Reads block `layer`; its tensors at the same time.
    ///
    /// # Errors
    /// A tensor that is missing, damaged or of another shape.
    pub fn read(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        layer: usize,
    ) -> Result<Self, ModelError> {
        let norm = |name: &str| {
            let name = format!("model.layers.{layer}.{name}.weight");
            checkpoint.f16(&name, &[config.hidden_size])
        };
        Ok(HostBlock {
            config: config.clone(),
            linears: Projection::ALL
                .into_par_iter()
                .map(|projection| HostLinear::read(checkpoint, config, projection, layer))
                .collect::<Result<_, _>>()?,
            input_norm: norm("input_layernorm")?,
            post_norm: norm("post_attention_layernorm")?,
        })
    }

    /// Puts the block on a device, in compute dtype; packed linears are dequantised.
    pub(crate) fn upload<B: Engine>(self, rope: &rope::Tables<B>, device: &B::Device) -> Block<B> {
        let linears = self.linears.into_iter().map(|linear| Linear {
            weight: match linear.weight {
                HostWeight::Dense(values) => model::upload(values, linear.shape, device),
                HostWeight::Packed(packed) => B::dequantise(&packed, device),
            },
            bias: linear.bias.map(|values| vector(values, device)),
        });
        Block {
            config: self.config,
            linears: linears.collect(),
            input_norm: vector(self.input_norm, device),
            post_norm: vector(self.post_norm, device),
            rope: rope.clone(),
        }
    }
}

impl HostLinear {
    fn read(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        projection: Projection,
        layer: usize,
    ) -> Result<Self, FormatError> {
        let module = projection.module(layer);
        let (n_in, n_out) = projection.shape(config);
        let shape = [n_out, n_in];
        let weight = match checkpoint.packed(&module, n_in, n_out)? {
            Some(packed) => HostWeight::Packed(packed),
            None => HostWeight::Dense(checkpoint.f16(&format!("{module}.weight"), &shape)?),
        };
        let bias = match projection.has_bias(config) {
            true => Some(checkpoint.f16(&format!("{module}.bias"), &[n_out])?),
            false => None,
        };
        Ok(HostLinear {
            shape,
            weight,
            bias,
        })
    }
}

fn vector<B: Engine>(values: Vec<f16>, device: &B::Device) -> Tensor<B, 1> {
    let length = values.len();
    model::upload(values, [length], device)
}
