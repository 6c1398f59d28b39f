//! Sources of rows: a file, a glob, or the files of a dataset; their formats and hashes.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::CalibrationError;
use crate::reader::{self, EachRow, Reading};

/// Source of calibration rows.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// A local file, or a glob over local files.
    Local(PathBuf),
    /// A dataset whose files are already local.
    Dataset {
        /// `owner/name`.
        name: String,
        /// The commit.
        revision: String,
        /// Each file's path in the dataset, and its local path.
        files: Vec<(String, PathBuf)>,
    },
}

/// A file that rows were read from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashedFile {
    /// File name, without local directories.
    pub name: String,
    /// Returns its size in bytes.
    pub bytes: u64,
    /// Its SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

/// Format of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
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
    pub format: Format,
    pub compression: Compression,
}

impl Source {
    /// Returns a name without local directories: the dataset's, or the last component of a local
    /// file or glob.
    pub fn name(&self) -> String {
        match self {
            Source::Local(path) => last_component(path),
            Source::Dataset { name, .. } => name.clone(),
        }
    }

    /// Returns the dataset's commit.
    pub fn revision(&self) -> Option<&str> {
        match self {
            Source::Local(_) => None,
            Source::Dataset { revision, .. } => Some(revision),
        }
    }

    /// Returns true if its rows are local.
    pub fn is_here(&self) -> bool {
        match self {
            Source::Local(_) => true,
            Source::Dataset { files, .. } => !files.is_empty(),
        }
    }

    /// Returns true if one of its files has the same bytes as `path`.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn holds(&self, path: &Path) -> Result<bool, CalibrationError> {
        let wanted = SourceFile {
            name: last_component(path),
            path: path.into(),
            format: Format::Text,
            compression: Compression::None,
        };
        let length = |path: &Path| {
            let metadata = path.metadata().map_err(CalibrationError::io(path));
            metadata.map(|metadata| metadata.len())
        };
        let bytes = length(path)?;
        let mut sha256 = None;
        for file in self.files()? {
            if length(&file.path)? != bytes {
                continue;
            }
            let wanted = match &sha256 {
                Some(sha256) => sha256,
                None => sha256.insert(wanted.hash()?.sha256),
            };
            if file.hash()?.sha256 == *wanted {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Returns true if rows can be read from a file of this name.
    pub fn reads(name: &str) -> bool {
        format(name).is_some()
    }

    /// Calls `each` with every row of every file, in order, until it breaks. Columnar files provide
    /// only `columns`.
    ///
    /// # Errors
    /// A file that cannot be read or is malformed, a missing column, or an error of `each`.
    pub fn rows(&self, columns: &[&str], each: &mut EachRow<'_>) -> Result<(), CalibrationError> {
        for file in self.files()? {
            if reader::read(&file, &Reading::of(columns), each)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// Returns its files in order; those of a glob are sorted by path. Errors if there is none, or
    /// one has an unknown format.
    pub(crate) fn files(&self) -> Result<Vec<SourceFile>, CalibrationError> {
        let paths = match self {
            Source::Local(path) => {
                let paths = expand(path)?.into_iter();
                paths.map(|path| (last_component(&path), path)).collect()
            }
            Source::Dataset { files, .. } => files.clone(),
        };
        paths
            .into_iter()
            .map(|(name, path)| match format(&name) {
                Some((format, compression)) => Ok(SourceFile {
                    name,
                    path,
                    format,
                    compression,
                }),
                None => Err(CalibrationError::UnknownFormat { path }),
            })
            .collect()
    }
}

fn last_component(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// An existing path is used as it is, even if it looks like a glob.
fn expand(path: &Path) -> Result<Vec<PathBuf>, CalibrationError> {
    let pattern = path.to_string_lossy();
    if path.exists() || !pattern.contains(['*', '?', '[']) {
        return Ok(vec![path.to_owned()]);
    }
    let malformed = |reason: String| CalibrationError::Malformed {
        path: path.into(),
        reason,
    };
    let mut paths = Vec::new();
    for entry in glob::glob(&pattern).map_err(|e| malformed(e.to_string()))? {
        let entry = entry.map_err(|e| malformed(e.to_string()))?;
        if entry.is_file() {
            paths.push(entry);
        }
    }
    paths.sort();
    match paths.is_empty() {
        true => Err(malformed("no file matches".into())),
        false => Ok(paths),
    }
}

/// Determines the format from the name's extensions.
pub(crate) fn format(name: &str) -> Option<(Format, Compression)> {
    let name = name.to_ascii_lowercase();
    let (name, compression) = match name.rsplit_once('.') {
        Some((stem, "gz")) => (stem, Compression::Gzip),
        Some((stem, "zst")) => (stem, Compression::Zstd),
        _ => (name.as_str(), Compression::None),
    };
    let format = match name.rsplit_once('.')?.1 {
        "json" => Format::Json,
        "jsonl" | "ndjson" => Format::JsonLines,
        "parquet" => Format::Parquet,
        "arrow" => Format::Arrow,
        "csv" => Format::Csv,
        "txt" => Format::Text,
        _ => return None,
    };
    Some((format, compression))
}

impl SourceFile {
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

/// Returns the lower-case hexadecimal SHA-256.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_the_published_one() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(b"abc"), abc);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc.txt");
        std::fs::write(&path, "abc").unwrap();
        let file = &Source::Local(path).files().unwrap()[0];
        let hashed = file.hash().unwrap();
        assert_eq!((hashed.bytes, hashed.sha256.as_str()), (3, abc));
        assert_eq!(hashed.name, "abc.txt", "no directory of this machine");
    }

    #[test]
    fn a_name_says_format_and_compression() {
        assert_eq!(format("a.JSON"), Some((Format::Json, Compression::None)));
        assert_eq!(
            format("x/a.jsonl.gz"),
            Some((Format::JsonLines, Compression::Gzip))
        );
        assert_eq!(
            format("a.parquet.zst"),
            Some((Format::Parquet, Compression::Zstd))
        );
        for name in ["a", "a.gz", "a.xlsx", "json", ".gitattributes"] {
            assert_eq!(format(name), None, "{name}");
        }
    }

    #[test]
    fn a_glob_is_sorted_and_one_without_files_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.txt", "a.txt", "c.json"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        let names = |pattern: &str| {
            let files = Source::Local(dir.path().join(pattern)).files()?;
            Ok(files.into_iter().map(|f| f.name).collect::<Vec<_>>())
        };
        let found: Result<_, CalibrationError> = names("*.txt");
        assert_eq!(found.unwrap(), ["a.txt", "b.txt"]);
        let none = names("*.csv").unwrap_err().to_string();
        assert!(none.contains("no file matches"), "{none}");
        let unknown = names("*.x").unwrap_err();
        assert!(matches!(unknown, CalibrationError::Malformed { .. }));
    }
}
