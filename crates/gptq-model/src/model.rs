//! Loads the parts of a model onto a device: the embedding, a block, the head.

use std::path::Path;

use burn::tensor::{DType, Int, Tensor, TensorData};
use gptq_format::{Checkpoint, Half, TABLE_PIECE};
use gptq_kernels::Engine;
use gptq_spec::{Census, ModelConfig};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};

use crate::{Block, Flow, Head, HostBlock, ModelError, rope};

/// A checkpoint and its config, from which parts are loaded. Quantized linear layers are
/// dequantized on loading.
pub struct Model<B: Engine> {
    config: ModelConfig,
    checkpoint: Checkpoint,
    half: Half,
    device: B::Device,
    rope: rope::Tables<B>,
}

/// The input embedding.
pub(crate) struct Embedding<B: Engine> {
    pub(crate) table: Tensor<B, 2>,
    /// Factor of its rows.
    pub(crate) scale: f64,
}

impl<B: Engine> Model<B> {
    /// Opens the checkpoint in `dir` with weights in their stored dtype. Nothing is loaded yet.
    ///
    /// # Errors
    /// Files that cannot be read, and a fault found by the [`Census`].
    pub fn open(dir: &Path, device: &B::Device) -> Result<Self, ModelError> {
        let (config, checkpoint) = Census::take(dir)?.sound()?;
        Ok(Model::new(config, checkpoint, device))
    }

    /// Wraps an open checkpoint, with the config from its [`Census`].
    pub fn new(config: ModelConfig, checkpoint: Checkpoint, device: &B::Device) -> Self {
        Model {
            config,
            half: checkpoint.half(),
            checkpoint,
            device: device.clone(),
            rope: rope::Tables::default(),
        }
    }

    /// Returns the model with weights converted to `half`.
    pub fn taken_in(self, half: Half) -> Self {
        Model { half, ..self }
    }

    /// Returns the 16-bit dtype that weights are converted to.
    pub fn half(&self) -> Half {
        self.half
    }

    /// Returns the 16-bit dtype in which its hidden states are kept between taps.
    pub fn state_half(&self) -> Half {
        B::state_half(self.half, self.config.wide)
    }

    /// Returns the compute dtype.
    pub fn dtype(&self) -> DType {
        B::compute(self.half)
    }

    /// Returns the device of its parts.
    pub fn device(&self) -> &B::Device {
        &self.device
    }

    /// Returns shapes and constants.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The files.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Returns the hidden states of `windows`, all of one length, before the first block: one
    /// [`Flow`] per `chunk` windows, in dtype `keep`.
    ///
    /// Errors on a token outside the vocabulary.
    pub fn embed(
        &self,
        windows: &[Vec<u32>],
        chunk: usize,
        keep: DType,
    ) -> Result<Vec<Flow<B>>, ModelError> {
        self.flows(windows, chunk, keep)?.collect()
    }

    /// Returns the same as [`Model::embed`], one [`Flow`] at a time.
    pub fn flows(
        &self,
        windows: &[Vec<u32>],
        chunk: usize,
        keep: DType,
    ) -> Result<impl Iterator<Item = Result<Flow<B>, ModelError>>, ModelError> {
        // Checked before reading the table, whose shape would be blamed for the wrong tokenizer.
        check_tokens(windows.iter().flatten(), self.config.vocabulary)?;
        let embedding = self.embedding()?;
        let chunks = windows.chunks(chunk);
        Ok(chunks.map(move |windows| embedding.flow(windows, keep)))
    }

    /// Loads the embedding for repeated use.
    pub(crate) fn embedding(&self) -> Result<Embedding<B>, ModelError> {
        let (rows, cols) = (self.config.vocabulary, self.config.hidden_size);
        Ok(Embedding {
            table: self.table(&self.config.naming.embedding(), [rows, cols])?,
            scale: self.config.ends.embedding,
        })
    }

    /// Loads block `layer`, in compute dtype.
    pub fn block(&self, layer: usize) -> Result<Block<B>, ModelError> {
        Ok(self.upload(self.read_block(layer)?))
    }

    /// Reads block `layer` into host memory, on any thread, while the device is busy.
    pub fn read_block(&self, layer: usize) -> Result<HostBlock, ModelError> {
        HostBlock::read::<B>(
            &self.checkpoint,
            self.config.block(layer),
            self.half,
            layer,
            &self.device,
        )
    }

    /// Uploads a block, in compute dtype.
    pub fn upload(&self, block: HostBlock) -> Block<B> {
        block.upload(false, &self.rope, &self.device)
    }

    /// Loads block `layer` for generation: packed linear layers stay packed if the backend can
    /// multiply with them.
    pub(crate) fn resident_block(&self, layer: usize) -> Result<Block<B>, ModelError> {
        let block = self.read_block(layer)?;
        Ok(block.upload(B::KEEPS_PACKED, &self.rope, &self.device))
    }

    /// Loads the final norm and output projection.
    pub fn head(&self) -> Result<Head<B>, ModelError> {
        let (config, naming) = (&self.config, self.config.naming);
        let name = match config.tied_embeddings {
            true => naming.embedding(),
            false => naming.head.to_owned(),
        };
        Ok(Head {
            weights: self.tensor(&naming.norm(), [config.hidden_size])?,
            norm: config.norm,
            weight: self.table(&name, [config.vocabulary, config.hidden_size])?,
            ends: config.ends,
        })
    }

    /// Loads a matrix onto the device, in compute dtype, [`TABLE_PIECE`] elements at a time, as a
    /// vocabulary's table may be as large as several blocks.
    fn table(&self, name: &str, [rows, cols]: [usize; 2]) -> Result<Tensor<B, 2>, ModelError> {
        let (device, dtype) = (&self.device, self.dtype());
        if dtype == DType::F32 {
            // An engine that computes in f32 has its tensors in host memory, where a slice
            // assignment copies the whole tensor, so the pieces are joined before.
            return self.host_table(name, [rows, cols]);
        }
        let step = (TABLE_PIECE / cols.max(1)).max(1) * cols;
        let mut table = Tensor::empty([rows, cols], (device, dtype));
        let bring = |first: usize, piece: &[u16]| {
            let mut values = B::host_buffer(piece.len(), self.half, device);
            values.bits_mut().copy_from_slice(piece);
            let own = [first / cols, piece.len() / cols];
            let part = B::upload(&values, 0, [own[1], cols], device).cast(dtype);
            let nothing = Tensor::empty([1, 1], (device, dtype));
            // With a single owner the assignment is in place.
            let old = std::mem::replace(&mut table, nothing);
            table = old.slice_assign([own[0]..own[0] + own[1], 0..cols], part);
            Ok::<_, ModelError>(())
        };
        let shape = [rows, cols];
        self.checkpoint
            .half_pieces(self.half, name, &shape, step, bring)?;
        Ok(table)
    }

    /// Does the same as [`Model::table`], in f32.
    fn host_table(&self, name: &str, shape: [usize; 2]) -> Result<Tensor<B, 2>, ModelError> {
        let mut values = vec![0f32; shape.iter().product()];
        let half = self.half;
        let widen = |first: usize, piece: &[u16]| {
            let values = &mut values[first..first + piece.len()];
            match half {
                Half::F16 => (piece.reinterpret_cast::<f16>()).convert_to_f32_slice(values),
                Half::Bf16 => (piece.reinterpret_cast::<bf16>()).convert_to_f32_slice(values),
            }
            Ok::<_, ModelError>(())
        };
        self.checkpoint
            .half_pieces(half, name, &shape, TABLE_PIECE, widen)?;
        let data = TensorData::new(values, shape);
        Ok(Tensor::from_data(data, (&self.device, DType::F32)))
    }

    /// Loads a tensor onto the device, in compute dtype.
    fn tensor<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
    ) -> Result<Tensor<B, D>, ModelError> {
        let mut values = B::host_buffer(shape.iter().product(), self.half, &self.device);
        self.checkpoint
            .halves_into(self.half, name, &shape, values.bits_mut())?;
        Ok(B::upload(&values, 0, shape, &self.device).cast(self.dtype()))
    }
}

impl<B: Engine> Embedding<B> {
    /// Returns the hidden states of `windows`, all of one length, in dtype `keep`.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    pub(crate) fn flow(&self, windows: &[Vec<u32>], keep: DType) -> Result<Flow<B>, ModelError> {
        check_tokens(windows.iter().flatten(), self.table.dims()[0])?;
        let ids: Vec<i32> = windows.iter().flatten().map(|&id| id as i32).collect();
        let n = ids.len();
        let ids = Tensor::<B, 1, Int>::from_data(
            TensorData::new(ids, [n]),
            (&self.table.device(), DType::I32),
        );
        let rows = B::embed(ids, self.table.clone());
        let residual = if self.scale == 1.0 {
            rows
        } else {
            rows * self.scale
        };
        Ok(Flow::new(windows.len(), residual.cast(keep)))
    }
}

/// Errors on a token outside the vocabulary.
pub(crate) fn check_tokens<'a>(
    mut ids: impl Iterator<Item = &'a u32>,
    vocabulary: usize,
) -> Result<(), ModelError> {
    match ids.find(|&&id| id as usize >= vocabulary) {
        Some(&id) => Err(ModelError::TokenOutOfRange { id, vocabulary }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod device_tests;
#[cfg(test)]
mod tests;
