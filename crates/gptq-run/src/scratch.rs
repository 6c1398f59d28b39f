//! Hidden states on disk: an unnamed file, deleted with the process, whose freed space is reused.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use gptq_format::FormatError;

/// The temporary file.
pub(crate) struct Scratch {
    dir: PathBuf,
    file: File,
    places: Mutex<FreeSpace>,
}

#[derive(Default)]
struct FreeSpace {
    /// Length of the file in bytes.
    end: u64,
    /// Offsets of free slots, by length.
    free: BTreeMap<u64, Vec<u64>>,
}

/// A range of the file, which is freed when this is dropped.
pub(crate) struct DiskSlot {
    scratch: Arc<Scratch>,
    start: u64,
    length: u64,
}

impl Scratch {
    /// Creates a file on the file system of `dir`.
    pub(crate) fn create(dir: &Path) -> Result<Arc<Self>, FormatError> {
        Ok(Arc::new(Scratch {
            dir: dir.into(),
            file: tempfile::tempfile_in(dir).map_err(FormatError::io(dir))?,
            places: Mutex::default(),
        }))
    }

    /// Writes `bytes` to a free slot.
    pub(crate) fn put(self: &Arc<Self>, bytes: &[u8]) -> Result<DiskSlot, FormatError> {
        let length = bytes.len() as u64;
        let start = {
            let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
            let free = places.free.get_mut(&length).and_then(Vec::pop);
            free.unwrap_or_else(|| {
                let end = places.end;
                places.end += length;
                end
            })
        };
        let slot = DiskSlot {
            scratch: self.clone(),
            start,
            length,
        };
        let written = self.file.write_all_at(bytes, start);
        written.map_err(FormatError::io(&self.dir))?;
        Ok(slot)
    }
}

impl DiskSlot {
    /// Reads the slot into `bytes`, which must have the same length.
    pub(crate) fn read(&self, bytes: &mut [u8]) -> Result<(), FormatError> {
        let read = self.scratch.file.read_exact_at(bytes, self.start);
        read.map_err(FormatError::io(&self.scratch.dir))
    }
}

impl Drop for DiskSlot {
    fn drop(&mut self) {
        let places = self.scratch.places.lock();
        let mut places = places.unwrap_or_else(PoisonError::into_inner);
        let free = places.free.entry(self.length).or_default();
        free.push(self.start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_used_again_and_the_file_has_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::create(dir.path()).unwrap();
        let mut slots: Vec<DiskSlot> = (0..4).map(|i| scratch.put(&[i; 100]).unwrap()).collect();
        for round in 4..20 {
            slots.remove(usize::from(round) % 4);
            slots.push(scratch.put(&[round; 100]).unwrap());
        }
        let mut bytes = [0; 100];
        for slot in &slots {
            slot.read(&mut bytes).unwrap();
            assert!(bytes[0] >= 4 && bytes == [bytes[0]; 100]);
        }
        assert_eq!(scratch.places.lock().unwrap().end, 400);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(Scratch::create(Path::new("/no/such/dir")).is_err());
    }
}
