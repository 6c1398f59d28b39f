//! A branch as one GGUF file for llama.cpp.
//!
//! Linear layers become blocks of 32 inputs with the branch's own codes and scales ([`GgufType::of_linear`]); embedding,
//! head and linears in full precision keep their 16 bits, or become Q8_0; norms and biases become f32.

use std::path::{Path, PathBuf};

use gptq_format::{
    FormatError, GgufTensor, GgufType, GgufValue, GgufWriter, Half, TABLE_PIECE, encode_blocks,
    le_bytes, q8_0,
};
use gptq_spec::{GgufEntry, GgufModel, ModelTensor, Role};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::batches::batches;
use crate::vocabulary::entries;
use crate::{ExportError, ExportSource};

/// Version of the quantized types' layouts.
const QUANTIZATION_VERSION: u32 = 2;

/// Element type of the embedding, the head, and linear layers in full precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TableType {
    /// The branch's 16 bits.
    #[default]
    Half,
    /// Q8_0, which rounds them.
    Q8_0,
}

/// A tensor of the file, and the one of the checkpoint that it holds.
struct Planned {
    tensor: ModelTensor,
    to: GgufTensor,
    quantized: bool,
}

/// Checks from headers, `g_idx` and the tokenizer that a GGUF file can hold the branch.
///
/// # Errors
/// A branch that the file cannot hold, with the remedy.
pub fn check_gguf(source: &ExportSource) -> Result<(), ExportError> {
    GgufExport::of(source)?.planned(TableType::Half)?;
    entries(&source.dir, source.config.vocabulary)?;
    Ok(())
}

/// Writes the branch into the file `target`, which appears when it is complete, and returns its length.
/// `on_progress` receives the finished share, 0 to 1.
///
/// # Errors
/// Those of [`check_gguf`]; a file that exists, or cannot be written.
pub fn write_gguf(
    source: &ExportSource,
    tables: TableType,
    target: &Path,
    on_progress: &mut dyn FnMut(f64),
) -> Result<u64, ExportError> {
    if std::fs::symlink_metadata(target).is_ok() {
        return Err(ExportError::Exists {
            path: target.into(),
        });
    }
    let mut partial = target.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let io = |path: &Path| FormatError::io(path.to_owned());
    if let Some(parent) = target.parent().filter(|it| *it != Path::new("")) {
        std::fs::create_dir_all(parent).map_err(io(parent))?;
    }
    // What an interrupted export left.
    if std::fs::symlink_metadata(&partial).is_ok_and(|meta| meta.is_file()) {
        std::fs::remove_file(&partial).map_err(io(&partial))?;
    }
    let written = GgufExport::of(source)?.fill(tables, &partial, on_progress);
    if written.is_err() {
        // The first error counts.
        let _ = std::fs::remove_file(&partial);
    }
    let bytes = written?;
    std::fs::rename(&partial, target).map_err(io(target))?;
    Ok(bytes)
}

/// A branch on its way into a file.
struct GgufExport<'a> {
    source: &'a ExportSource,
    model: GgufModel<'a>,
}

impl<'a> GgufExport<'a> {
    fn of(source: &'a ExportSource) -> Result<Self, ExportError> {
        let model = GgufModel::of(&source.config).map_err(|reason| ExportError::Gguf {
            dir: source.dir.clone(),
            reason,
        })?;
        Ok(GgufExport { source, model })
    }

    fn fill(
        &self,
        tables: TableType,
        path: &Path,
        on_progress: &mut dyn FnMut(f64),
    ) -> Result<u64, ExportError> {
        let planned = self.planned(tables)?;
        let divisors = self.model.divisors();
        let mut tensors: Vec<GgufTensor> = planned.iter().map(|it| it.to.clone()).collect();
        tensors.extend(divisors.iter().map(|(name, values)| GgufTensor {
            name: (*name).to_owned(),
            kind: GgufType::F32,
            shape: vec![values.len()],
        }));
        let metadata = self.metadata(&planned)?;
        let mut file = GgufWriter::create(path, &metadata, &tensors)?;
        for (name, values) in &divisors {
            file.write(name, &floats(values.iter().copied()))?;
        }
        let mut done = 0;
        let weights = |it: &Planned| match it.quantized {
            true => it.tensor.shape.iter().product(),
            false => 0,
        };
        for some in batches(&planned, weights) {
            let encoded: Vec<Option<Vec<u8>>> = (some.par_iter())
                .map(|it| self.blocks(it))
                .collect::<Result<_, _>>()?;
            for (it, encoded) in some.iter().zip(encoded) {
                match encoded {
                    Some(bytes) => file.write(&it.to.name, &bytes)?,
                    None => self.plain(it, &mut file)?,
                }
            }
            done += some.len();
            on_progress(done as f64 / planned.len() as f64);
        }
        Ok(file.finish()?)
    }

    fn refuse(&self, reason: String) -> ExportError {
        ExportError::Gguf {
            dir: self.source.dir.clone(),
            reason,
        }
    }

    fn planned(&self, tables: TableType) -> Result<Vec<Planned>, ExportError> {
        let half = match self.source.checkpoint.half() {
            Half::F16 => GgufType::F16,
            Half::Bf16 => GgufType::Bf16,
        };
        let mut planned = Vec::new();
        for tensor in self.source.config.tensors() {
            let linear = self.source.linear(&tensor)?;
            let kind = match (&linear, tensor.role, tables) {
                (Some(linear), ..) => {
                    let module = tensor.module();
                    let (n_in, n_out) = (linear.in_features, linear.out_features);
                    let scattered = self.source.checkpoint.scattered(module, n_in, n_out)?;
                    GgufType::of_linear(
                        linear,
                        self.source.settings.sym,
                        scattered.unwrap_or_default(),
                    )
                    .map_err(|refusal| self.refuse(format!("{module}: {refusal}")))?
                }
                (None, Role::Carried(_), _) => continue,
                (None, Role::Vector, _) => GgufType::F32,
                (None, _, TableType::Q8_0) if tensor.shape[1].is_multiple_of(32) => GgufType::Q8_0,
                _ => half,
            };
            let to = GgufTensor {
                name: self.model.name(&tensor).map_err(|why| self.refuse(why))?,
                kind,
                shape: tensor.shape.clone(),
            };
            planned.push(Planned {
                tensor,
                to,
                quantized: linear.is_some(),
            });
        }
        Ok(planned)
    }

    fn metadata(&self, planned: &[Planned]) -> Result<Vec<GgufEntry>, ExportError> {
        let text = |text: &str| GgufValue::Text(text.to_owned());
        let name = self.source.settings.model_name_or_path.as_deref();
        let dir = self
            .source
            .dir
            .file_name()
            .map(|it| it.to_string_lossy().into_owned());
        let name = name
            .and_then(|it| it.rsplit('/').next())
            .map(str::to_owned)
            .or(dir);
        let count = |kind| {
            planned
                .iter()
                .filter(|it| it.quantized && it.to.kind == kind)
                .count()
        };
        // The numbers of llama.cpp's list of file types.
        let types = [
            (GgufType::Q4_0, 2),
            (GgufType::Q5_0, 8),
            (GgufType::Q8_0, 7),
        ];
        let most = types.into_iter().max_by_key(|(kind, _)| count(*kind));
        let mut all: Vec<GgufEntry> = [
            ("architecture", text(self.model.architecture())),
            ("type", text("model")),
            ("name", text(&name.unwrap_or_default())),
            (
                "file_type",
                GgufValue::U32(most.map_or(1, |(_, number)| number)),
            ),
            ("quantization_version", GgufValue::U32(QUANTIZATION_VERSION)),
        ]
        .map(|(key, value)| (format!("general.{key}"), value))
        .into();
        all.extend(self.model.keys());
        all.extend(entries(&self.source.dir, self.source.config.vocabulary)?);
        Ok(all)
    }

    /// Returns a quantized linear layer as blocks; `None` for other tensors.
    fn blocks(&self, it: &Planned) -> Result<Option<Vec<u8>>, ExportError> {
        let (true, &[n_out, n_in]) = (it.quantized, it.tensor.shape.as_slice()) else {
            return Ok(None);
        };
        let module = it.tensor.module();
        let packed = self.source.checkpoint.packed(module, n_in, n_out)?;
        let rows = self.model.rows(&it.tensor);
        let blocks = packed.map(|packed| encode_blocks(&packed, it.to.kind, rows, module));
        Ok(blocks.transpose()?)
    }

    /// Writes a tensor that is not quantized, a piece at a time where its rows stay in order.
    fn plain(&self, it: &Planned, file: &mut GgufWriter) -> Result<(), ExportError> {
        let Planned { tensor, to, .. } = it;
        let half = self.source.checkpoint.half();
        let shift = self.model.shift(tensor);
        let encode = |values: &[u16]| match to.kind {
            GgufType::F32 => floats(values.iter().map(|bits| widened(half, *bits) + shift)),
            GgufType::Q8_0 => {
                let values: Vec<f32> = values.iter().map(|bits| widened(half, *bits)).collect();
                let mut bytes = Vec::new();
                q8_0(&values, &mut bytes);
                bytes
            }
            _ => le_bytes(values).to_vec(),
        };
        let rows = self.model.rows(tensor);
        let count = tensor.shape[0];
        let sources = rows.sources(count);
        if sources.is_sorted() {
            file.write_pieces(&to.name, |put| {
                let (name, shape) = (&tensor.name, &tensor.shape);
                let pieces = &self.source.checkpoint;
                pieces.half_pieces(half, name, shape, TABLE_PIECE, |_, piece| {
                    put(&encode(piece))
                })
            })?;
            return Ok(());
        }
        let mut values = vec![0; tensor.shape.iter().product()];
        self.source
            .checkpoint
            .halves_into(half, &tensor.name, &tensor.shape, &mut values)?;
        let width = values.len() / count;
        let ordered: Vec<u16> = (sources.iter())
            .flat_map(|row| &values[row * width..(row + 1) * width])
            .copied()
            .collect();
        Ok(file.write(&to.name, &encode(&ordered))?)
    }
}

fn floats(values: impl Iterator<Item = f32>) -> Vec<u8> {
    values.flat_map(f32::to_le_bytes).collect()
}

fn widened(half: Half, bits: u16) -> f32 {
    match half {
        Half::F16 => f16::from_bits(bits).to_f32(),
        Half::Bf16 => bf16::from_bits(bits).to_f32(),
    }
}
