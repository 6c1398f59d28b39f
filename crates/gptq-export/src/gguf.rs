//! A branch as one GGUF file for llama.cpp.
//!
//! Linear layers become blocks of 32 inputs with the branch's own codes and scales ([`GgufType::of_linear`]); embedding,
//! head and linears in full precision keep their 16 bits, or become Q8_0; norms and biases become f32.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use gptq_format::{
    FormatError, GgufTensor, GgufType, GgufValue, GgufWriter, Half, TABLE_PIECE, encode_blocks,
    le_bytes, q8_0,
};
use gptq_plan::Plan;
use gptq_spec::{GgufEntry, GgufLayout, GgufModel, GgufPart, ModelTensor, TableType};
use half::{bf16, f16};

use crate::batches::carry_out;
use crate::vocabulary::entries;
use crate::{ExportError, ExportSource};

/// Version of the quantized types' layouts.
const QUANTIZATION_VERSION: u32 = 2;

/// Checks that GGUF files can hold the tokenizer of a plan's model, if any branch has one. Shapes alone, without weights
/// and tokenizer, pass.
///
/// # Errors
/// No tokenizer, or one that llama.cpp does not have.
pub fn check_tokenizer(plan: &Plan) -> Result<(), ExportError> {
    let asked = plan
        .branches
        .iter()
        .any(|branch| branch.gguf_file().is_some());
    let shapes = plan.weights.is_none() && !plan.model_dir.join("tokenizer.json").exists();
    if asked && !shapes {
        entries(&plan.model_dir, plan.config.vocabulary)?;
    }
    Ok(())
}

/// Checks from headers, `g_idx` and the tokenizer that a GGUF file can hold the branch.
///
/// # Errors
/// A branch that the file cannot hold, with the remedy.
pub fn check_gguf(source: &ExportSource) -> Result<(), ExportError> {
    GgufExport::of(source)?.layout(TableType::Half)?;
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
        let GgufLayout { mut tensors, parts } = self.layout(tables)?;
        let divisors = self.model.divisors();
        tensors.extend(divisors.iter().map(|(name, values)| GgufTensor {
            name: (*name).to_owned(),
            kind: GgufType::F32,
            shape: vec![values.len()],
        }));
        let file = GgufWriter::create(path, &self.metadata(&parts)?, &tensors)?;
        for (name, values) in &divisors {
            file.write(name, &floats(values.iter().copied()))?;
        }
        let weights = |it: &GgufPart| match it.quantized {
            true => it.tensor.shape.iter().product(),
            false => 0,
        };
        let write = |it: &GgufPart| match it.quantized {
            true => self.blocks(it, &file),
            false => self.plain(it, &file),
        };
        carry_out(&parts, weights, write, || file.sync(), on_progress)?;
        Ok(file.finish()?)
    }

    fn refuse(&self, reason: String) -> ExportError {
        ExportError::Gguf {
            dir: self.source.dir.clone(),
            reason,
        }
    }

    fn layout(&self, tables: TableType) -> Result<GgufLayout, ExportError> {
        let source = self.source;
        let mut kinds = HashMap::new();
        for (tensor, linear) in source.linears()? {
            let (module, n_in, n_out) = (tensor.module(), linear.in_features, linear.out_features);
            let scattered = source.checkpoint.scattered(module, n_in, n_out)?;
            let sym = source.settings.sym;
            let kind = GgufType::of_linear(&linear, sym, scattered.unwrap_or_default());
            let kind = kind.map_err(|refusal| self.refuse(format!("{module}: {refusal}")))?;
            kinds.insert(tensor.name, kind);
        }
        let kind = |tensor: &ModelTensor| kinds.get(&tensor.name).copied();
        let layout = GgufLayout::of(&self.model, source.checkpoint.half(), tables, kind);
        layout.map_err(|reason| self.refuse(reason))
    }

    fn metadata(&self, parts: &[GgufPart]) -> Result<Vec<GgufEntry>, ExportError> {
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
            parts
                .iter()
                .filter(|it| it.quantized && it.kind == kind)
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

    /// Writes a quantized linear layer as blocks.
    fn blocks(&self, it: &GgufPart, file: &GgufWriter) -> Result<(), ExportError> {
        let &[n_out, n_in] = it.tensor.shape.as_slice() else {
            return Ok(());
        };
        let module = it.tensor.module();
        let packed = self.source.checkpoint.packed(module, n_in, n_out)?;
        let rows = self.model.rows(&it.tensor);
        if let Some(packed) = packed {
            let blocks = encode_blocks(&packed, it.kind, rows, module)?;
            file.write_at(&it.name, it.start, &blocks)?;
        }
        Ok(())
    }

    /// Writes a tensor that is not quantized, a piece at a time where its rows stay in order.
    fn plain(&self, it: &GgufPart, file: &GgufWriter) -> Result<(), ExportError> {
        let tensor = &it.tensor;
        let half = self.source.checkpoint.half();
        let shift = self.model.shift(tensor);
        let encode = |values: &[u16]| match it.kind {
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
            let mut start = it.start;
            let (name, shape) = (&tensor.name, &tensor.shape);
            let pieces = &self.source.checkpoint;
            pieces.half_pieces(half, name, shape, TABLE_PIECE, |_, piece| {
                let bytes = encode(piece);
                file.write_at(&it.name, start, &bytes)?;
                start += bytes.len();
                Ok::<_, FormatError>(())
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
        Ok(file.write_at(&it.name, it.start, &encode(&ordered))?)
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
