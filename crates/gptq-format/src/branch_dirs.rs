//! Finds branches below an output directory.

use std::fs;
use std::path::{Path, PathBuf};

use crate::FormatError;
use crate::staged_dir::{OLD, PARTIAL};

/// Returns the directories directly below `dir` with their names, `main` first, then by name.
/// Staging directories of a current or interrupted run are left out. The caller decides which files
/// make a directory a branch.
///
/// # Errors
/// `dir` cannot be read.
pub fn branch_dirs(dir: &Path) -> Result<Vec<(String, PathBuf)>, FormatError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(FormatError::io(dir))? {
        let path = entry.map_err(FormatError::io(dir))?.path();
        let unfinished = (path.extension()).is_some_and(|end| end == PARTIAL || end == OLD);
        if path.is_dir() && !unfinished {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            found.push((name.into_owned(), path));
        }
    }
    found.sort_by(|a, b| (a.0 != "main", &a.0).cmp(&(b.0 != "main", &b.0)));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn main_comes_first_and_what_a_run_left_is_no_branch() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["z", "main", "a.b", "main.partial", "a.old"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("README.md"), "x").unwrap();
        let found = branch_dirs(dir.path()).unwrap();
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["main", "a.b", "z"]);
        assert!(found.iter().all(|(name, path)| path.ends_with(name)));
        assert!(branch_dirs(&dir.path().join("nothing")).is_err());
    }
}
