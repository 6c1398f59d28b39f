//! SHA-256 of a linear's tensors: what the maker wrote, for whoever reads it back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Encoded, FloatScan, FormatError};

/// Lower-case hexadecimal SHA-256 of each of a linear's tensors, by its suffix: of the raw little-endian bytes, as
/// they lie in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TensorDigests(BTreeMap<String, String>);

impl TensorDigests {
    /// Most tensors that a linear may have in what is read from elsewhere, and bytes of a suffix and a digest.
    const MAX: (usize, usize) = (16, 64);

    /// Digests of a linear's tensors as they are written.
    pub fn of(tensors: &[Encoded<'_>]) -> Self {
        let digest = |it: &Encoded<'_>| (it.suffix.to_owned(), sha256(&it.bytes));
        tensors.iter().map(digest).collect()
    }

    /// The digest of one tensor.
    pub fn get(&self, suffix: &str) -> Option<&str> {
        self.0.get(suffix).map(String::as_str)
    }

    /// The suffix of the first tensor that only one of the two has, or that differs.
    pub fn difference<'a>(&'a self, other: &'a TensorDigests) -> Option<&'a str> {
        let all: BTreeSet<&String> = self.0.keys().chain(other.0.keys()).collect();
        let mut all = all.into_iter().map(String::as_str);
        all.find(|suffix| self.get(suffix) != other.get(suffix))
    }

    /// Checks that their number and lengths are possible for one linear layer.
    ///
    /// # Errors
    /// A pattern beyond a limit; the error is half a line.
    pub fn check(&self) -> Result<(), String> {
        let (tensors, bytes) = TensorDigests::MAX;
        let long = |(suffix, digest): (&String, &String)| suffix.len().max(digest.len()) > bytes;
        match self.0.len() > tensors || self.0.iter().any(long) {
            true => Err(format!(
                "over {tensors} tensors, or over {bytes} bytes of a name or digest"
            )),
            false => Ok(()),
        }
    }
}

impl FromIterator<(String, String)> for TensorDigests {
    /// Builds the digests from pairs of suffix and digest.
    fn from_iter<T: IntoIterator<Item = (String, String)>>(digests: T) -> Self {
        TensorDigests(digests.into_iter().collect())
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
    /// Computes the digest of a file, read a piece at a time; `None` as soon as `stop` returns true.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn of(path: &Path, stop: impl Fn() -> bool) -> Result<Option<Self>, FormatError> {
        Self::scanned(path, &mut FloatScan::default(), stop)
    }

    /// Does the same, and passes each piece to `scan`.
    ///
    /// # Errors
    /// The file cannot be read, or `scan` finds a value that cannot be quantized.
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
    use crate::le_bytes;

    #[test]
    fn digests_are_read_from_the_four_fields_of_earlier_reports_and_written_the_same() {
        let text = r#"{"g_idx":"d","qweight":"a","qzeros":"b","scales":"c"}"#;
        let read: TensorDigests = serde_json::from_str(text).unwrap();
        assert_eq!(read.get("qzeros"), Some("b"));
        assert_eq!(serde_json::to_string(&read).unwrap(), text);
        assert!(read.check().is_ok());
    }

    #[test]
    fn a_tensor_that_differs_or_that_one_side_lacks_is_named() {
        let digests = |pairs: &[(&str, &str)]| -> TensorDigests {
            let owned = pairs.iter().map(|(a, b)| (a.to_string(), b.to_string()));
            owned.collect()
        };
        let whole = digests(&[("qweight", "a"), ("scales", "c")]);
        assert_eq!(whole.difference(&whole), None);
        for other in [
            digests(&[("qweight", "a"), ("scales", "x")]),
            digests(&[("qweight", "a")]),
        ] {
            assert_eq!(whole.difference(&other), Some("scales"));
            assert_eq!(other.difference(&whole), Some("scales"));
        }
        let endless = digests(&[("qweight", &"0".repeat(65))]);
        assert!(endless.check().is_err());
    }

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
