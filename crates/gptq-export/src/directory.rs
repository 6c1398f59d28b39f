//! A branch as a directory of safetensors files in another format.
//!
//! Linear layers are read, encoded and written in batches, so that memory does not grow with the model; tensors
//! that are not quantized are copied as they are.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Mutex;

use gptq_format::{
    FormatError, FormatName, Grids, ModuleSettings, PackedLinear, ShardedWriter, StagedDir,
    TensorDigests, TensorSpec, copy_side_files, layout, read_json, write_json,
};
use gptq_plan::{BranchReport, written_config};
use gptq_spec::{ModelConfig, ModelTensor, Role};
use serde_json::Value;

use crate::batches::carry_out;
use crate::gguf::{check_gguf, write_gguf};
use crate::{ExportError, ExportSource, TableType};

/// Bytes copied at a time.
const PIECE: usize = 4 << 20;

/// Checks from headers and `g_idx` alone that `format` can hold every linear layer of a branch, and a GGUF file the
/// tokenizer.
///
/// # Errors
/// The first that it cannot hold, with the remedy.
pub fn check(source: &ExportSource, format: FormatName) -> Result<(), ExportError> {
    if format == FormatName::Gguf {
        return check_gguf(source);
    }
    let (dir, settings) = (&source.dir, &source.settings);
    let target = format.checkpoint_format(settings.sym);
    if target == settings.checkpoint_format {
        return Err(ExportError::Same {
            dir: dir.clone(),
            format,
        });
    }
    let layout = layout(target, settings.sym);
    for (tensor, linear) in source.linears()? {
        let module = tensor.module();
        let (n_in, n_out) = (linear.in_features, linear.out_features);
        let scattered = source.checkpoint.scattered(module, n_in, n_out)?;
        let grids = Grids {
            sym: settings.sym,
            scattered: scattered.unwrap_or_default(),
        };
        layout
            .fits(&linear, grids)
            .map_err(|refusal| ExportError::DoesNotFit {
                dir: dir.clone(),
                module: module.to_owned(),
                format,
                refusal,
            })?;
    }
    Ok(())
}

/// Writes the branch into the directory `target`, or for GGUF the file, which appears when it is complete, and returns the
/// bytes of its weight files. `on_progress` receives the finished share, 0 to 1.
///
/// # Errors
/// Those of [`check`]; files that cannot be read or written.
pub fn write_directory(
    source: &ExportSource,
    format: FormatName,
    target: &Path,
    on_progress: &mut dyn FnMut(f64),
) -> Result<u64, ExportError> {
    if format == FormatName::Gguf {
        return write_gguf(source, TableType::default(), target, on_progress);
    }
    check(source, format)?;
    let dir = StagedDir::create(target)?;
    let path = dir.path();
    let (settings, layout) = (source.settings_in(format)?, source.layout(format));
    let tensors = source.config.tensors();
    let specs = specs(source, &tensors, format)?;
    let weights = ShardedWriter::create(path, &specs, shard_size(source)?)?;
    copy_side_files(&source.dir, path)?;
    let base = source.dir.join("config.json");
    let (mut config, _) = written_config(read_json(&base)?, source.checkpoint.half())
        .map_err(|reason| FormatError::Malformed { path: base, reason })?;
    for key in ["quantization_config", "quantization"] {
        config.remove(key);
    }
    // As the tensors have it, which may not be what the config says.
    let tied = ModelConfig::from_json(Value::Object(config.clone()));
    if tied.is_ok_and(|it| it.tied_embeddings) != source.config.tied_embeddings {
        let tied = source.config.tied_embeddings.into();
        config.insert("tie_word_embeddings".to_owned(), tied);
    }
    layout.write_settings(&settings, &modules(source)?, &mut config, path)?;
    write_json(&path.join("config.json"), &config)?;
    let recorded = source.dir.join("report.json").is_file();
    let digests = Mutex::new(HashMap::new());
    let mut weights_of = HashMap::new();
    for (tensor, linear) in source.linears()? {
        weights_of.insert(tensor.name, linear.weights() as usize);
    }
    let of = |tensor: &ModelTensor| weights_of.get(&tensor.name).copied().unwrap_or_default();
    let write = |tensor: &ModelTensor| {
        let Some(packed) = packed(source, tensor)? else {
            return Ok(copy(source, &tensor.name, &weights)?);
        };
        let module = tensor.module();
        let parts = layout.encode(module, &packed)?;
        for part in &parts {
            weights.write(&layout.tensor_name(module, part.suffix), &part.bytes)?;
        }
        if recorded {
            let found = TensorDigests::of(&parts);
            let mut digests = digests.lock().expect("inserting cannot panic");
            digests.insert(module.to_owned(), found);
        }
        Ok(())
    };
    carry_out(&tensors, of, write, || weights.sync(), on_progress)?;
    let bytes = weights.finish()?;
    if recorded {
        let mut digests = digests.into_inner().expect("inserting cannot panic");
        let mut report = BranchReport::read(&source.dir)?;
        for linear in &mut report.linears {
            linear.digests = digests.remove(&linear.name);
        }
        report.quantize_config = settings;
        report.bytes = bytes;
        // These files are no run's.
        report.fingerprint = None;
        report.write(path)?;
    }
    dir.sync()?;
    dir.commit()?;
    Ok(bytes)
}

fn specs(
    source: &ExportSource,
    tensors: &[ModelTensor],
    format: FormatName,
) -> Result<Vec<TensorSpec>, ExportError> {
    let layout = source.layout(format);
    let mut specs = Vec::new();
    for tensor in tensors {
        match source.linear(tensor)? {
            Some(linear) => specs.extend(layout.tensors(tensor.module(), &linear)),
            None => specs.push(TensorSpec {
                name: tensor.name.clone(),
                dtype: source.checkpoint.view(&tensor.name)?.dtype,
                shape: tensor.shape.clone(),
            }),
        }
    }
    Ok(specs)
}

/// Returns all linear layers of the blocks with their settings.
fn modules(source: &ExportSource) -> Result<Vec<ModuleSettings>, FormatError> {
    let tensors = source.config.tensors().into_iter();
    let linears = tensors.filter(|tensor| tensor.role == Role::Linear);
    linears
        .map(|tensor| {
            let module = tensor.module();
            Ok((module.to_owned(), source.settings.module(module)?))
        })
        .collect()
}

/// Returns the size of the largest weight file if there are several.
fn shard_size(source: &ExportSource) -> Result<Option<u64>, FormatError> {
    let files = source.checkpoint.files();
    if files.len() < 2 {
        return Ok(None);
    }
    let mut largest = 0;
    for file in files {
        let path = source.dir.join(file);
        let meta = std::fs::metadata(&path).map_err(FormatError::io(&path))?;
        largest = largest.max(meta.len());
    }
    Ok(Some(largest))
}

fn packed(
    source: &ExportSource,
    tensor: &ModelTensor,
) -> Result<Option<PackedLinear>, ExportError> {
    Ok(match source.linear(tensor)? {
        Some(linear) => {
            let (n_in, n_out) = (linear.in_features, linear.out_features);
            source.checkpoint.packed(tensor.module(), n_in, n_out)?
        }
        None => None,
    })
}

fn copy(source: &ExportSource, name: &str, weights: &ShardedWriter) -> Result<(), FormatError> {
    let bytes = source.checkpoint.view(name)?.bytes();
    weights.write_pieces(name, |put| bytes.chunks(PIECE).try_for_each(put))?;
    source.checkpoint.give_back(name);
    Ok(())
}
