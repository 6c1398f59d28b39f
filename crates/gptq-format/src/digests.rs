//! SHA-256 of a linear's tensors: what the maker wrote, for whoever reads it back.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{FloatScan, FormatError, PackedLinear, le_bytes};

/// Lower-case hexadecimal SHA-256 of each tensor's raw little-endian bytes, as they lie in the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the tensors'")]
pub struct LinearDigests {
    pub qweight: String,
    pub qzeros: String,
    pub scales: String,
    pub g_idx: String,
}

impl LinearDigests {
    /// Of a linear as it is written.
    pub fn of(linear: &PackedLinear) -> Self {
        LinearDigests {
            qweight: sha256(le_bytes(&linear.qweight)),
            qzeros: sha256(le_bytes(&linear.qzeros)),
            scales: sha256(le_bytes(&linear.scales)),
            g_idx: sha256(le_bytes(&linear.g_idx)),
        }
    }
}

/// Returns the lower-case hexadecimal SHA-256.
pub fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// A file's length, and the lower-case hexadecimal SHA-256 of what it holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct FileDigest {
    pub bytes: u64,
    pub sha256: String,
}

impl FileDigest {
    /// Of a file, read a piece at a time; `None` as soon as `stop` says so.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn of(path: &Path, stop: impl Fn() -> bool) -> Result<Option<Self>, FormatError> {
        Self::scanned(path, &mut FloatScan::default(), stop)
    }

    /// The same, with a look at the values that go by.
    ///
    /// # Errors
    /// It cannot be read; what `scan` finds.
    pub fn scanned(
        path: &Path,
        scan: &mut FloatScan,
        stop: impl Fn() -> bool,
    ) -> Result<Option<Self>, FormatError> {
        let file = File::open(path).map_err(FormatError::io(path))?;
        let mut file = BufReader::with_capacity(1 << 18, file);
        let (mut hash, mut bytes) = (Sha256::new(), 0);
        while !stop() {
            let piece = file.fill_buf().map_err(FormatError::io(path))?;
            let read = piece.len();
            if read == 0 {
                let sha256 = hexadecimal(&hash.finalize());
                return Ok(Some(FileDigest { bytes, sha256 }));
            }
            hash.update(piece);
            scan.feed(piece)?;
            file.consume(read);
            bytes += read as u64;
        }
        Ok(None)
    }
}

/// Lower-case hexadecimal SHA-256 of a file, read a piece at a time.
///
/// # Errors
/// The file cannot be read.
pub fn sha256_file(path: &Path) -> Result<String, FormatError> {
    let digest = FileDigest::of(path, || false)?;
    Ok(digest.unwrap_or_default().sha256)
}

/// Lower-case hexadecimal.
pub fn hexadecimal(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_of_little_endian_bytes() {
        // The example of FIPS 180-4.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(b"abc"), abc);
        assert_eq!(sha256(le_bytes(&[0x6463_6261_i32])), sha256(b"abcd"));
    }

    #[test]
    fn a_file_is_hashed_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let (path, bytes) = (dir.path().join("a"), vec![7; 1_000_000]);
        std::fs::write(&path, &bytes).unwrap();
        let whole = FileDigest::of(&path, || false).unwrap().unwrap();
        assert_eq!((whole.bytes, &whole.sha256), (1_000_000, &sha256(&bytes)));
        assert_eq!(sha256_file(&path).unwrap(), whole.sha256);
        let asked = std::cell::Cell::new(0);
        let stop = || asked.replace(asked.get() + 1) == 2;
        assert_eq!(FileDigest::of(&path, stop).unwrap(), None);
        assert_eq!(asked.get(), 3);
    }
}
