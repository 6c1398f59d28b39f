//! Writes a GGUF file whose tensors are known beforehand: the header first, then each tensor at its offset in any order.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{ALIGNMENT, GgufTensor, GgufValue, MAGIC, VERSION};
use crate::FormatError;

/// A file being written.
pub struct GgufWriter {
    path: PathBuf,
    file: File,
    /// Offset and bytes of the tensors that are still to come.
    pending: BTreeMap<String, (u64, usize)>,
    length: u64,
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
            if places.insert(tensor.name.clone(), (end, bytes)).is_some() {
                return Err(unplanned());
            }
            end = (end + bytes as u64).next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        let start = header.len() as u64;
        places.values_mut().for_each(|(offset, _)| *offset += start);
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
            pending: places,
            length,
        })
    }

    /// Writes a tensor in pieces: `fill` passes them to its argument in order.
    ///
    /// # Errors
    /// A tensor that was not planned, is already written, or has another length; errors of `fill`.
    pub fn write_pieces(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<(), FormatError>) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        let unplanned = || FormatError::UnplannedWrite { name: name.into() };
        let (offset, bytes) = self.pending.remove(name).ok_or_else(unplanned)?;
        let mut written = 0;
        fill(&mut |piece: &[u8]| {
            if piece.len() > bytes - written {
                return Err(unplanned());
            }
            self.file
                .write_all_at(piece, offset + written as u64)
                .map_err(FormatError::io(&self.path))?;
            written += piece.len();
            Ok(())
        })?;
        match written == bytes {
            true => Ok(()),
            false => Err(unplanned()),
        }
    }

    /// Writes a whole tensor.
    ///
    /// # Errors
    /// Those of [`GgufWriter::write_pieces`].
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        self.write_pieces(name, |put| put(bytes))
    }

    /// Syncs the file, and returns its length.
    ///
    /// # Errors
    /// A planned tensor is missing; the file cannot be synced.
    pub fn finish(self) -> Result<u64, FormatError> {
        if let Some(first) = self.pending.keys().next() {
            return Err(FormatError::Unwritten {
                dir: self.path.clone(),
                missing: self.pending.len(),
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
