//! Writes safetensors files whose contents are known by name and shape beforehand: headers go out
//! first, then each tensor at its place, in any order, so that no more than one tensor is in memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::f16;
use safetensors::Dtype;
use serde_json::json;

use crate::{FormatError, write_json};

/// Bytes written to a file after which they are sent to the disk, so that little is left to wait
/// for at the end.
const SYNC_EVERY: usize = 256 << 20;

/// A tensor's elements as a file holds them.
pub fn le_bytes<T: LittleEndian>(values: &[T]) -> Cow<'_, [u8]> {
    match cfg!(target_endian = "little") {
        true => Cow::Borrowed(bytemuck::cast_slice(values)),
        false => values.iter().flat_map(|&value| value.bytes()).collect(),
    }
}

/// An element type with little-endian bytes.
pub trait LittleEndian: bytemuck::NoUninit {
    /// Its bytes, the lowest first.
    fn bytes(self) -> impl Iterator<Item = u8>;
}

macro_rules! little_endian {
    ($($element:ty),*) => {$(
        impl LittleEndian for $element {
            fn bytes(self) -> impl Iterator<Item = u8> {
                self.to_le_bytes().into_iter()
            }
        }
    )*};
}

little_endian!(u32, i32, f16);

/// A tensor to come.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Open shards and what is still missing from them.
pub struct ShardedWriter {
    shards: Vec<Shard>,
    pending: BTreeMap<String, Place>,
}

struct Shard {
    path: PathBuf,
    file: File,
    /// Bytes written since the last sync.
    unsynced: usize,
}

struct Place {
    shard: usize,
    offset: u64,
    bytes: usize,
}

impl ShardedWriter {
    /// Lays `specs` out in their order over as many files as `shard_size` bytes asks for, and writes
    /// every header. One file is `model.safetensors`; several are `model-0000i-of-0000n.safetensors`
    /// with `model.safetensors.index.json`.
    pub fn create(
        dir: &Path,
        specs: &[TensorSpec],
        shard_size: Option<u64>,
    ) -> Result<Self, FormatError> {
        let plan = split(specs, shard_size.unwrap_or(u64::MAX));
        let mut writer = ShardedWriter {
            shards: Vec::new(),
            pending: BTreeMap::new(),
        };
        let mut weight_map = BTreeMap::new();
        for (i, shard) in plan.iter().enumerate() {
            let file = match plan.len() {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
            for spec in shard {
                weight_map.insert(spec.name.clone(), file.clone());
            }
            writer.add_shard(dir.join(file), shard)?;
        }
        if plan.len() > 1 {
            let total: usize = specs.iter().map(TensorSpec::bytes).sum();
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            write_json(&dir.join("model.safetensors.index.json"), &index)?;
        }
        Ok(writer)
    }

    fn add_shard(&mut self, path: PathBuf, specs: &[&TensorSpec]) -> Result<(), FormatError> {
        // Widest elements first keeps every tensor aligned, as the safetensors library does.
        let mut order = specs.to_vec();
        order.sort_by(|a, b| (b.dtype.bitsize(), &a.name).cmp(&(a.dtype.bitsize(), &b.name)));
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut end = 0;
        let mut places = Vec::new();
        for spec in order {
            let (start, bytes) = (end, spec.bytes());
            end += bytes;
            header.insert(
                spec.name.clone(),
                json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [start, end]}),
            );
            places.push((spec.name.clone(), start, bytes));
        }
        let mut text = serde_json::Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let data = 8 + text.len();

        let file = File::create(&path).map_err(FormatError::io(&path))?;
        file.write_all_at(&(text.len() as u64).to_le_bytes(), 0)
            .and_then(|()| file.write_all_at(&text, 8))
            .and_then(|()| file.set_len((data + end) as u64))
            .map_err(FormatError::io(&path))?;
        let shard = self.shards.len();
        self.shards.push(Shard {
            path,
            file,
            unsynced: 0,
        });
        for (name, start, bytes) in places {
            let offset = (data + start) as u64;
            self.pending.insert(
                name,
                Place {
                    shard,
                    offset,
                    bytes,
                },
            );
        }
        Ok(())
    }

    /// Writes one tensor's little-endian bytes. Errors when it was not planned, was written before,
    /// or has another length.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let place = self
            .pending
            .remove(name)
            .filter(|place| place.bytes == bytes.len());
        let planned = place.and_then(|place| Some((self.shards.get_mut(place.shard)?, place)));
        let (shard, place) =
            planned.ok_or_else(|| FormatError::UnplannedWrite { name: name.into() })?;
        shard.unsynced += bytes.len();
        shard
            .file
            .write_all_at(bytes, place.offset)
            .and_then(|()| match shard.unsynced < SYNC_EVERY {
                true => Ok(()),
                false => {
                    shard.unsynced = 0;
                    shard.file.sync_data()
                }
            })
            .map_err(FormatError::io(&shard.path))
    }

    /// Syncs every file; errors when a planned tensor never came. Returns the bytes on disk.
    pub fn finish(self) -> Result<u64, FormatError> {
        if let Some(first) = self.pending.keys().next() {
            return Err(FormatError::Unwritten {
                missing: self.pending.len(),
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

/// Greedy split in order; a tensor larger than `shard_size` gets a shard of its own.
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
            let mut writer = ShardedWriter::create(dir.path(), &specs(), shard_size).unwrap();
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
    fn missing_double_and_wrong_writes_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardedWriter::create(dir.path(), &specs(), None).unwrap();
        assert!(writer.write("nobody", &[]).is_err());
        assert!(writer.write("a.scales", &[0; 5]).is_err());
        writer.write("b.g_idx", &[0; 16]).unwrap();
        assert!(writer.write("b.g_idx", &[0; 16]).is_err());
        assert!(matches!(
            writer.finish(),
            Err(FormatError::Unwritten { .. })
        ));
    }
}
