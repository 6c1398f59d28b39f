//! A decoder block's weights in host memory, read while the device processes the previous block.

use std::sync::Arc;

use burn::tensor::Tensor;
use gptq_format::{Checkpoint, FormatError, Half, PackedLinear};
use gptq_kernels::{Engine, HostBuffer};
use gptq_spec::{BlockSpec, LinearSpec};
use rayon::prelude::*;

use crate::experts::BlockMatrix;
use crate::{Block, Linear, ModelError, Weight, rope};

/// One block, read and checked, not yet on a device. Its 16-bit tensors are contiguous in memory
/// that the device copies from.
pub struct HostBlock {
    spec: Arc<BlockSpec>,
    values: HostBuffer,
    linears: Vec<HostLinear>,
    /// Offsets of the vectors in `values`.
    vectors: Vec<usize>,
    /// Offsets of the matrices in `values`, and their corrections.
    matrices: Vec<(usize, Option<Vec<f32>>)>,
}

struct HostLinear {
    /// `[out, in]`.
    shape: [usize; 2],
    weight: HostWeight,
    /// Offset in `values`.
    bias: Option<usize>,
}

enum HostWeight {
    /// Offset in `values`.
    Dense(usize),
    Packed(PackedLinear),
}

/// A tensor to read to its offset.
struct Part {
    name: String,
    shape: Vec<usize>,
}

impl Part {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Tensors in the order of their offsets.
#[derive(Default)]
struct Layout {
    parts: Vec<Part>,
    len: usize,
}

impl Layout {
    /// Adds a tensor; returns its offset.
    fn add(&mut self, name: String, shape: Vec<usize>) -> usize {
        let part = Part { name, shape };
        let start = self.len;
        self.len += part.len();
        self.parts.push(part);
        start
    }
}

impl HostBlock {
    /// Reads block `layer`, described by `spec`, with its tensors in parallel, into memory for
    /// transfers to `device`.
    ///
    /// # Errors
    /// A tensor that is missing, damaged or of the wrong shape.
    pub(crate) fn read<B: Engine>(
        checkpoint: &Checkpoint,
        spec: &Arc<BlockSpec>,
        half: Half,
        layer: usize,
        device: &B::Device,
    ) -> Result<Self, ModelError> {
        let mut layout = Layout::default();
        let vectors = spec.vectors().iter().map(|vector| {
            let name = format!("{}.weight", vector.module(layer));
            layout.add(name, vec![vector.len])
        });
        let vectors = vectors.collect();
        let matrices = spec.matrices().iter().map(|matrix| {
            let start = layout.add(matrix.weight(layer), matrix.shape.into());
            let correction = matrix.correction(layer);
            let read = |name: String| checkpoint.view(&name)?.f32();
            Ok::<_, FormatError>((start, correction.map(read).transpose()?))
        });
        let matrices = matrices.collect::<Result<_, _>>()?;
        let linears = (spec.linears().iter())
            .map(|linear| HostLinear::read(checkpoint, linear, layer, &mut layout))
            .collect::<Result<_, _>>()?;
        let mut values = B::host_buffer(layout.len, half, device);
        let mut rest = values.bits_mut();
        let mut places = Vec::with_capacity(layout.parts.len());
        for part in &layout.parts {
            let (place, others) = rest.split_at_mut(part.len());
            places.push((part, place));
            rest = others;
        }
        places.into_par_iter().try_for_each(|(part, place)| {
            checkpoint.halves_into(half, &part.name, &part.shape, place)
        })?;
        Ok(HostBlock {
            spec: spec.clone(),
            values,
            linears,
            vectors,
            matrices,
        })
    }

    /// Returns a linear layer as stored, by its index in the spec, if it is quantized.
    pub fn packed(&self, linear: usize) -> Option<&PackedLinear> {
        match &self.linears[linear].weight {
            HostWeight::Packed(packed) => Some(packed),
            HostWeight::Dense(_) => None,
        }
    }

    /// Uploads the block to a device, in compute dtype; packed linear layers are dequantized unless
    /// `keep_packed`.
    pub(crate) fn upload<B: Engine>(
        self,
        keep_packed: bool,
        rope: &rope::Tables<B>,
        device: &B::Device,
    ) -> Block<B> {
        let dtype = B::compute(self.values.half());
        let linears = self.linears.iter().map(|linear| Linear {
            weight: match &linear.weight {
                HostWeight::Dense(start) => {
                    let weight = B::upload(&self.values, *start, linear.shape, device);
                    Weight::Dense(weight.cast(dtype))
                }
                HostWeight::Packed(packed) if keep_packed => {
                    Weight::Packed(B::resident(packed, device))
                }
                HostWeight::Packed(packed) => {
                    Weight::Dense(B::dequantize_packed(packed, dtype, device))
                }
            },
            bias: linear
                .bias
                .map(|start| self.vector(start, linear.shape[0], device)),
        });
        let vectors = self.spec.vectors().iter().zip(&self.vectors);
        let vectors = vectors.map(|(vector, start)| self.vector(*start, vector.len, device));
        let matrices = self.spec.matrices().iter().zip(&self.matrices);
        let matrices = matrices.map(|(matrix, (start, correction))| BlockMatrix {
            weight: B::upload(&self.values, *start, matrix.shape, device).cast(dtype),
            correction: correction.clone(),
        });
        Block {
            matrices: matrices.collect(),
            linears: linears.collect(),
            vectors: vectors.collect(),
            rope: rope.clone(),
            spec: self.spec.clone(),
        }
    }

    fn vector<B: Engine>(&self, start: usize, len: usize, device: &B::Device) -> Tensor<B, 1> {
        let vector = B::upload(&self.values, start, [len], device);
        vector.cast(B::compute(self.values.half()))
    }
}

impl HostLinear {
    fn read(
        checkpoint: &Checkpoint,
        linear: &LinearSpec,
        layer: usize,
        layout: &mut Layout,
    ) -> Result<Self, FormatError> {
        let module = linear.module(layer);
        let (n_in, n_out) = linear.shape();
        let shape = [n_out, n_in];
        let weight = match checkpoint.packed(&module, n_in, n_out)? {
            Some(packed) => HostWeight::Packed(packed),
            None => HostWeight::Dense(layout.add(format!("{module}.weight"), shape.into())),
        };
        let bias = linear
            .bias
            .then(|| layout.add(format!("{module}.bias"), vec![n_out]));
        Ok(HostLinear {
            shape,
            weight,
            bias,
        })
    }
}
