//! A file of rows: its format, compression and hash.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use gptq_format::hexadecimal;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::CalibrationError;

/// A file that rows were read from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashedFile {
    /// File name, without local directories.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// Its SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

/// Format of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowFormat {
    Json,
    JsonLines,
    Parquet,
    Arrow,
    Csv,
    Text,
}

/// Compression of the whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// One file of a source.
#[derive(Clone, Debug)]
pub(crate) struct SourceFile {
    pub name: String,
    pub path: PathBuf,
    pub format: RowFormat,
    pub compression: Compression,
}

/// Determines the format from the name's extensions.
pub(crate) fn format(name: &str) -> Option<(RowFormat, Compression)> {
    let name = name.to_ascii_lowercase();
    let (name, compression) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Compression::Gzip),
        Some((stem, "zst")) => (stem, Compression::Zstd),
        _ => (name.as_str(), Compression::None),
    };
    let format = match name.rsplit_once('.')?.1 {
        "json" => RowFormat::Json,
        "jsonl" | "ndjson" => RowFormat::JsonLines,
        "parquet" => RowFormat::Parquet,
        "arrow" => RowFormat::Arrow,
        "csv" => RowFormat::Csv,
        "txt" => RowFormat::Text,
        _ => return None,
    };
    Some((format, compression))
}

impl SourceFile {
    /// Makes the error of a malformed file.
    pub(crate) fn malformed(&self, reason: impl ToString) -> CalibrationError {
        CalibrationError::Malformed {
            path: self.path.clone(),
            reason: reason.to_string().replace('\n', "; "),
        }
    }

    /// Hashes the file in one pass.
    pub(crate) fn hash(&self) -> Result<HashedFile, CalibrationError> {
        let mut file = File::open(&self.path).map_err(CalibrationError::io(&self.path))?;
        let mut hasher = Sha256::new();
        let mut piece = vec![0; 1 << 20];
        let mut bytes = 0;
        loop {
            let n = file
                .read(&mut piece)
                .map_err(CalibrationError::io(&self.path))?;
            if n == 0 {
                break;
            }
            bytes += n as u64;
            hasher.update(piece.get(..n).unwrap_or_default());
        }
        Ok(HashedFile {
            name: self.name.clone(),
            bytes,
            sha256: hexadecimal(&hasher.finalize()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_the_published_one() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc.txt");
        std::fs::write(&path, "abc").unwrap();
        let file = SourceFile {
            name: "abc.txt".into(),
            path,
            format: RowFormat::Text,
            compression: Compression::None,
        };
        let hashed = file.hash().unwrap();
        assert_eq!((hashed.bytes, hashed.sha256.as_str()), (3, abc));
        assert_eq!(hashed.name, "abc.txt", "no directory of this machine");
    }

    #[test]
    fn a_name_says_format_and_compression() {
        assert_eq!(format("a.JSON"), Some((RowFormat::Json, Compression::None)));
        assert_eq!(
            format("x/a.jsonl.gz"),
            Some((RowFormat::JsonLines, Compression::Gzip))
        );
        assert_eq!(
            format("a.parquet.zst"),
            Some((RowFormat::Parquet, Compression::Zstd))
        );
        for name in ["a", "a.gz", "a.xlsx", "json", ".gitattributes"] {
            assert_eq!(format(name), None, "{name}");
        }
    }
}
