//! Writes safetensors files whose tensors are known by name and shape beforehand: headers first,
//! then each tensor at its offset in any order and from any thread, so at most one tensor is in memory.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use half::f16;
use safetensors::Dtype;
use serde_json::json;

use crate::{FormatError, write_json};

/// Returns a tensor's elements as stored in files.
pub fn le_bytes<T: LittleEndian>(values: &[T]) -> &[u8] {
    bytemuck::cast_slice(values)
}

/// Element type with the same layout in memory and in files. Hidden states and weights are written
/// to disk from memory in several places, so big-endian machines are not supported.
pub trait LittleEndian: bytemuck::NoUninit {}

#[cfg(not(target_endian = "little"))]
compile_error!("gptq supports only little-endian machines");

impl LittleEndian for u16 {}
impl LittleEndian for u32 {}
impl LittleEndian for f32 {}
impl LittleEndian for i32 {}
impl LittleEndian for i64 {}
impl LittleEndian for f16 {}

/// A planned tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Returns its size in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Open shards and their missing tensors.
pub struct ShardedWriter {
    shards: Vec<Shard>,
    /// Tensors that are still to come.
    pending: Mutex<BTreeMap<String, Place>>,
}

struct Shard {
    path: PathBuf,
    file: File,
    /// True if bytes were written since the last sync.
    unsynced: AtomicBool,
}

struct Place {
    shard: usize,
    offset: u64,
    bytes: usize,
}

impl ShardedWriter {
    /// Distributes `specs` in their order over files of about `shard_size` bytes, and writes every
    /// header. One file is `model.safetensors`; several are `model-0000i-of-0000n.safetensors` with
    /// `model.safetensors.index.json`.
    ///
    /// # Errors
    /// A file of such a name exists, or cannot be written.
    pub fn create(
        dir: &Path,
        specs: &[TensorSpec],
        shard_size: Option<u64>,
    ) -> Result<Self, FormatError> {
        let writer = ShardedWriter::lay_out(dir, specs, shard_size, create_shard)?;
        if writer.shards.len() > 1 {
            let total: usize = specs.iter().map(TensorSpec::bytes).sum();
            let file = |place: &Place| {
                let path = &writer.shards.get(place.shard)?.path;
                Some(path.file_name()?.to_string_lossy())
            };
            let pending = writer.pending.lock();
            let pending = pending.unwrap_or_else(PoisonError::into_inner);
            let weight_map: BTreeMap<_, _> = (pending.iter())
                .filter_map(|(name, place)| Some((name, file(place)?)))
                .collect();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            write_json(&dir.join("model.safetensors.index.json"), &index)?;
        }
        writer.sync()?;
        Ok(writer)
    }

    /// Reopens files of [`ShardedWriter::create`] to resume. The caller marks the tensors that are
    /// already written ([`ShardedWriter::keep`]).
    ///
    /// # Errors
    /// A file that is missing, is a link, or has a different layout.
    pub fn reopen(
        dir: &Path,
        specs: &[TensorSpec],
        shard_size: Option<u64>,
    ) -> Result<Self, FormatError> {
        ShardedWriter::lay_out(dir, specs, shard_size, open_shard)
    }

    fn lay_out(
        dir: &Path,
        specs: &[TensorSpec],
        shard_size: Option<u64>,
        open: fn(&Path, &[u8], u64) -> Result<File, FormatError>,
    ) -> Result<Self, FormatError> {
        let plan = split(specs, shard_size.unwrap_or(u64::MAX));
        let (mut opened, mut pending) = (Vec::new(), BTreeMap::new());
        let shards = plan.len();
        for (i, specs) in plan.iter().enumerate() {
            let path = dir.join(match shards {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            });
            let (header, places, end) = header(i, specs);
            let file = open(&path, &header, end)?;
            opened.push(Shard {
                path,
                file,
                unsynced: AtomicBool::new(true),
            });
            pending.extend(places);
        }
        Ok(ShardedWriter {
            shards: opened,
            pending: Mutex::new(pending),
        })
    }

    /// Marks a tensor as written by the interrupted run.
    ///
    /// # Errors
    /// The tensor was not planned, or is already written.
    pub fn keep(&self, name: &str) -> Result<(), FormatError> {
        match self.take(name) {
            Some(_) => Ok(()),
            None => Err(FormatError::UnplannedWrite { name: name.into() }),
        }
    }

    fn take(&self, name: &str) -> Option<Place> {
        let pending = self.pending.lock();
        pending.unwrap_or_else(PoisonError::into_inner).remove(name)
    }

    /// Writes one tensor's little-endian bytes, from any thread. Errors if it was not planned, is already written,
    /// or has another length.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        self.write_pieces(name, |put| put(bytes))
    }

    /// Writes a tensor in pieces: `fill` passes them to its argument in order.
    ///
    /// # Errors
    /// The same errors as [`ShardedWriter::write`], and errors of `fill`.
    pub fn write_pieces(
        &self,
        name: &str,
        fill: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<(), FormatError>) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        let unplanned = || FormatError::UnplannedWrite { name: name.into() };
        let place = self.take(name);
        let planned = place.and_then(|place| Some((self.shards.get(place.shard)?, place)));
        let (shard, place) = planned.ok_or_else(unplanned)?;
        let (file, path) = (&shard.file, &shard.path);
        let mut written = 0;
        fill(&mut |bytes: &[u8]| {
            if bytes.len() > place.bytes - written {
                return Err(unplanned());
            }
            file.write_all_at(bytes, place.offset + written as u64)
                .map_err(FormatError::io(path))?;
            written += bytes.len();
            shard.unsynced.store(true, Ordering::Release);
            Ok(())
        })?;
        if written == place.bytes {
            Ok(())
        } else {
            Err(unplanned())
        }
    }

    /// Syncs everything written so far.
    pub fn sync(&self) -> Result<(), FormatError> {
        let changed = |shard: &&Shard| shard.unsynced.swap(false, Ordering::AcqRel);
        self.shards.iter().filter(changed).try_for_each(|shard| {
            let synced = shard.file.sync_data();
            synced.map_err(FormatError::io(&shard.path))
        })
    }

    /// Syncs every file; errors if a planned tensor is missing. Returns the bytes on disk.
    pub fn finish(self) -> Result<u64, FormatError> {
        let pending = self.pending.into_inner();
        let pending = pending.unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = pending.keys().next() {
            let dir = self.shards.first().and_then(|shard| shard.path.parent());
            return Err(FormatError::Unwritten {
                dir: dir.unwrap_or(Path::new("")).to_owned(),
                missing: pending.len(),
                first: first.clone(),
            });
        }
        let mut total = 0;
        for Shard { path, file, .. } in &self.shards {
            file.sync_all().map_err(FormatError::io(path))?;
            total += file.metadata().map_err(FormatError::io(path))?.len();
        }
        Ok(total)
    }
}

/// Returns a file's bytes up to its first tensor, each tensor's location, and the file's length.
fn header(shard: usize, specs: &[&TensorSpec]) -> (Vec<u8>, Vec<(String, Place)>, u64) {
    // Widest elements first keeps every tensor aligned, as in the safetensors library.
    let mut order = specs.to_vec();
    order.sort_by(|a, b| (b.dtype.bitsize(), &a.name).cmp(&(a.dtype.bitsize(), &b.name)));
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut end = 0;
    for spec in &order {
        let start = end;
        end += spec.bytes();
        header.insert(
            spec.name.clone(),
            json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]}),
        );
    }
    let mut text = serde_json::Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let data = 8 + text.len();
    let mut offset = data as u64;
    let places = order.into_iter().map(|spec| {
        let bytes = spec.bytes();
        let place = Place {
            shard,
            offset,
            bytes,
        };
        offset += bytes as u64;
        (spec.name.clone(), place)
    });
    let places = places.collect();
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    (bytes, places, (data + end) as u64)
}

fn create_shard(path: &Path, header: &[u8], length: u64) -> Result<File, FormatError> {
    let file = OpenOptions::new().write(true).create_new(true).open(path);
    file.and_then(|file| {
        file.write_all_at(header, 0)?;
        file.set_len(length)?;
        Ok(file)
    })
    .map_err(FormatError::io(path))
}

fn open_shard(path: &Path, header: &[u8], length: u64) -> Result<File, FormatError> {
    let meta = std::fs::symlink_metadata(path).map_err(FormatError::io(path))?;
    if !meta.is_file() {
        return Err(FormatError::NotAFile { path: path.into() });
    }
    let mut found = vec![0; header.len()];
    let file = OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(FormatError::io(path))?;
    let same = meta.len() == length && file.read_exact_at(&mut found, 0).is_ok();
    match same && found == header {
        true => Ok(file),
        false => Err(FormatError::Malformed {
            path: path.into(),
            reason: "its layout differs from this run's; use --restart to start over".into(),
        }),
    }
}

/// Splits greedily in order; a tensor larger than `shard_size` gets its own shard.
fn split(specs: &[TensorSpec], shard_size: u64) -> Vec<Vec<&TensorSpec>> {
    let (mut shards, mut shard) = (Vec::new(), Vec::new());
    let mut filled = 0u64;
    for spec in specs {
        let bytes = spec.bytes() as u64;
        if !shard.is_empty() && filled.saturating_add(bytes) > shard_size {
            shards.push(std::mem::take(&mut shard));
            filled = 0;
        }
        filled += bytes;
        shard.push(spec);
    }
    shards.push(shard);
    shards
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Checkpoint;

    fn specs() -> Vec<TensorSpec> {
        let spec = |name: &str, dtype, shape: &[usize]| TensorSpec {
            name: name.into(),
            dtype,
            shape: shape.into(),
        };
        vec![
            spec("a.scales", Dtype::F16, &[3]),
            spec("a.qweight", Dtype::I32, &[2, 2]),
            spec("b.g_idx", Dtype::I32, &[4]),
        ]
    }

    #[test]
    fn single_and_sharded_files_read_back_the_same() {
        for shard_size in [None, Some(20), Some(1)] {
            let dir = tempfile::tempdir().unwrap();
            let writer = ShardedWriter::create(dir.path(), &specs(), shard_size).unwrap();
            let ints: Vec<u8> = (1..=4i32).flat_map(i32::to_le_bytes).collect();
            writer.write("b.g_idx", &ints).unwrap();
            writer.write("a.qweight", &ints).unwrap();
            let halves = [0x3c00u16, 0xc000, 0].map(u16::to_le_bytes).concat();
            writer.write("a.scales", &halves).unwrap();
            writer.finish().unwrap();
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(checkpoint.i32("a.qweight", &[2, 2]).unwrap(), [1, 2, 3, 4]);
            assert_eq!(checkpoint.i32("b.g_idx", &[4]).unwrap(), [1, 2, 3, 4]);
            assert_eq!(checkpoint.f16("a.scales", &[3]).unwrap()[1].to_f32(), -2.0);
            let sharded = dir.path().join("model.safetensors.index.json").exists();
            assert_eq!(sharded, shard_size.is_some());
        }
    }

    #[test]
    fn an_unfinished_file_is_gone_on_with_and_another_layout_or_a_link_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let reopen = |specs: &[TensorSpec]| ShardedWriter::reopen(dir.path(), specs, None);
        let writer = ShardedWriter::create(dir.path(), &specs(), None).unwrap();
        writer.write("b.g_idx", &[7; 16]).unwrap();
        drop(writer);
        let writer = reopen(&specs()).unwrap();
        writer.keep("b.g_idx").unwrap();
        assert!(writer.keep("b.g_idx").is_err());
        writer.write("a.qweight", &[1; 16]).unwrap();
        writer.write("a.scales", &[0; 6]).unwrap();
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.i32("b.g_idx", &[4]).unwrap(), [0x0707_0707; 4]);
        drop(checkpoint);

        assert!(matches!(
            reopen(&specs()[..2]),
            Err(FormatError::Malformed { .. })
        ));
        let (file, moved) = (
            dir.path().join("model.safetensors"),
            dir.path().join("moved"),
        );
        std::fs::rename(&file, &moved).unwrap();
        std::os::unix::fs::symlink(&moved, &file).unwrap();
        assert!(matches!(
            reopen(&specs()),
            Err(FormatError::NotAFile { .. })
        ));
        assert!(ShardedWriter::create(dir.path(), &specs(), None).is_err());
    }

    #[test]
    fn a_tensor_may_come_in_pieces_that_fill_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let writer = ShardedWriter::create(dir.path(), &specs(), None).unwrap();
        let two = |put: &mut dyn FnMut(&[u8]) -> Result<(), FormatError>| {
            put(&[1; 4]).and_then(|()| put(&[2; 4]))
        };
        assert!(writer.write_pieces("a.scales", two).is_err(), "too long");
        assert!(writer.write_pieces("a.qweight", two).is_err(), "too short");
        let pieces = |put: &mut dyn FnMut(&[u8]) -> Result<(), FormatError>| {
            put(&[1; 12]).and_then(|()| put(&[2; 4]))
        };
        writer.write_pieces("b.g_idx", pieces).unwrap();
        drop(writer);
        let file = std::fs::read(dir.path().join("model.safetensors")).unwrap();
        let whole = [[1; 4], [1; 4], [1; 4], [2; 4]].concat();
        assert!(file.windows(16).any(|window| window == whole));
    }

    #[test]
    fn missing_double_and_wrong_writes_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let writer = ShardedWriter::create(dir.path(), &specs(), None).unwrap();
        assert!(writer.write("nobody", &[]).is_err());
        assert!(writer.write("a.scales", &[0; 5]).is_err());
        writer.write("b.g_idx", &[0; 16]).unwrap();
        assert!(writer.write("b.g_idx", &[0; 16]).is_err());
        let line = writer.finish().unwrap_err().to_string();
        assert!(line.contains("tensor a.qweight of this branch"), "{line}");
        assert!(
            line.contains("config.json") && !line.contains("(s)"),
            "{line}"
        );
    }
}
