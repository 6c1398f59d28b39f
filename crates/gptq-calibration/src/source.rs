//! Sources of rows: a file, a glob, or the files of a dataset.

use std::path::{Path, PathBuf};

use crate::row::{EachRow, Reading};
use crate::source_file::{Compression, RowFormat, SourceFile, format};
use crate::{CalibrationError, reader};

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
            format: RowFormat::Text,
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

    /// Returns the names of the first file's columns; of its first row, where rows may differ.
    ///
    /// # Errors
    /// No file, or one that cannot be read or is malformed.
    pub fn columns(&self) -> Result<Vec<String>, CalibrationError> {
        match self.files()?.first() {
            Some(file) => reader::columns(file),
            None => Ok(Vec::new()),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

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
