//! Writes a GGUF file whose tensors are known beforehand: the header first, then each tensor at its offset in any order.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::{ALIGNMENT, GgufTensor, GgufValue, MAGIC, VERSION};
use crate::FormatError;

/// A file being written.
pub struct GgufWriter {
    path: PathBuf,
    file: File,
    places: BTreeMap<String, Place>,
    length: u64,
}

/// A tensor's part of the file.
struct Place {
    offset: u64,
    bytes: usize,
    /// Parts that are written, in any order: where each begins, and where it ends.
    written: Mutex<BTreeMap<usize, usize>>,
}

impl Place {
    /// Takes note of a part, if it lies within the tensor and touches no other.
    fn take(&self, start: usize, length: usize) -> Option<u64> {
        let end = start.checked_add(length).filter(|end| *end <= self.bytes)?;
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let before = written.range(..end).next_back();
        if before.is_some_and(|(_, until)| *until > start) {
            return None;
        }
        if start < end {
            written.insert(start, end);
        }
        Some(self.offset + start as u64)
    }

    fn is_whole(&self) -> bool {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = written.iter().map(|(start, end)| end - start).sum();
        all == self.bytes
    }
}

impl GgufWriter {
    /// Creates `path` with its metadata and the places of `tensors`.
    ///
    /// # Errors
    /// The file exists or cannot be written; a tensor whose rows are no whole blocks, or a second one of its name.
    pub fn create(
        path: &Path,
        metadata: &[(String, GgufValue)],
        tensors: &[GgufTensor],
    ) -> Result<Self, FormatError> {
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        for (key, value) in metadata {
            text(&mut header, key);
            put(&mut header, value);
        }
        let (mut end, mut places) = (0u64, BTreeMap::new());
        for tensor in tensors {
            let unplanned = || FormatError::UnplannedWrite {
                name: tensor.name.clone(),
            };
            let bytes = tensor.bytes().ok_or_else(unplanned)?;
            text(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            for n in tensor.shape.iter().rev() {
                header.extend((*n as u64).to_le_bytes());
            }
            header.extend(tensor.kind.id().to_le_bytes());
            header.extend(end.to_le_bytes());
            let place = Place {
                offset: end,
                bytes,
                written: Mutex::default(),
            };
            if places.insert(tensor.name.clone(), place).is_some() {
                return Err(unplanned());
            }
            end = (end + bytes as u64).next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        let start = header.len() as u64;
        places.values_mut().for_each(|place| place.offset += start);
        let length = start + end;
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.and_then(|file| {
            file.write_all_at(&header, 0)?;
            file.set_len(length)?;
            Ok(file)
        });
        Ok(GgufWriter {
            path: path.into(),
            file: file.map_err(FormatError::io(path))?,
            places,
            length,
        })
    }

    /// Writes the bytes of a tensor from byte `start` on. Parts may come in any order, and from several threads.
    ///
    /// # Errors
    /// A tensor that was not planned, a part that is not within it or is already written; the file cannot be written.
    pub fn write_at(&self, name: &str, start: usize, bytes: &[u8]) -> Result<(), FormatError> {
        let place = self.places.get(name);
        let place = place.and_then(|place| place.take(start, bytes.len()));
        let place = place.ok_or_else(|| FormatError::UnplannedWrite { name: name.into() })?;
        let written = self.file.write_all_at(bytes, place);
        written.map_err(FormatError::io(&self.path))
    }

    /// Writes a whole tensor.
    ///
    /// # Errors
    /// Those of [`GgufWriter::write_at`].
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        self.write_at(name, 0, bytes)
    }

    /// Syncs everything written so far.
    ///
    /// # Errors
    /// The file cannot be synced.
    pub fn sync(&self) -> Result<(), FormatError> {
        self.file.sync_data().map_err(FormatError::io(&self.path))
    }

    /// Syncs the file, and returns its length.
    ///
    /// # Errors
    /// A planned tensor is missing; the file cannot be synced.
    pub fn finish(self) -> Result<u64, FormatError> {
        let mut missing = self.places.iter().filter(|(_, place)| !place.is_whole());
        if let Some((first, _)) = missing.next() {
            return Err(FormatError::Unwritten {
                dir: self.path.clone(),
                missing: 1 + missing.count(),
                first: first.clone(),
            });
        }
        self.file.sync_all().map_err(FormatError::io(&self.path))?;
        Ok(self.length)
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put(out: &mut Vec<u8>, value: &GgufValue) {
    let kind = value.kind();
    out.extend(kind.to_le_bytes());
    let array = |out: &mut Vec<u8>, kind: u32, len: usize| {
        out.extend(kind.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        GgufValue::U32(n) => out.extend(n.to_le_bytes()),
        GgufValue::I32(n) => out.extend(n.to_le_bytes()),
        GgufValue::F32(x) => out.extend(x.to_le_bytes()),
        GgufValue::U64(n) => out.extend(n.to_le_bytes()),
        GgufValue::Bool(yes) => out.push(u8::from(*yes)),
        GgufValue::Text(it) => text(out, it),
        GgufValue::U32s(all) => {
            array(out, 4, all.len());
            out.extend(all.iter().flat_map(|n| n.to_le_bytes()));
        }
        GgufValue::I32s(all) => {
            array(out, 5, all.len());
            out.extend(all.iter().flat_map(|n| n.to_le_bytes()));
        }
        GgufValue::F32s(all) => {
            array(out, 6, all.len());
            out.extend(all.iter().flat_map(|x| x.to_le_bytes()));
        }
        GgufValue::Bools(all) => {
            array(out, 7, all.len());
            out.extend(all.iter().map(|yes| u8::from(*yes)));
        }
        GgufValue::Texts(all) => {
            array(out, 8, all.len());
            all.iter().for_each(|it| text(out, it));
        }
        GgufValue::Other(_, bytes) => out.extend(bytes),
    }
}
