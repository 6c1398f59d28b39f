//! A directory that appears under its name only when it is complete.
//!
//! Files are written into a `.partial` sibling; [`StagedDir::commit`] syncs it and renames it into
//! place. Dropped without a commit, it removes the sibling.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::FormatError;

/// The file whose presence says that a directory was written by this project and may be replaced.
const MARKER: &str = "report.json";

/// A directory being written.
#[derive(Debug)]
pub struct StagedDir {
    partial: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl StagedDir {
    /// Refuses a target that exists and is neither empty nor an earlier result.
    pub fn check(target: &Path) -> Result<(), FormatError> {
        let occupied = FormatError::Occupied { dir: target.into() };
        match fs::symlink_metadata(target) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(FormatError::io(target)(e)),
            Ok(meta) if !meta.is_dir() => Err(occupied),
            Ok(_) => {
                let mut entries = fs::read_dir(target).map_err(FormatError::io(target))?;
                if entries.next().is_none() || target.join(MARKER).is_file() {
                    Ok(())
                } else {
                    Err(occupied)
                }
            }
        }
    }

    /// Starts `target`; a `.partial` left by a run that died is removed.
    pub fn create(target: &Path) -> Result<Self, FormatError> {
        Self::check(target)?;
        let partial = sibling(target, "partial");
        if partial.exists() {
            fs::remove_dir_all(&partial).map_err(FormatError::io(&partial))?;
        }
        fs::create_dir_all(&partial).map_err(FormatError::io(&partial))?;
        Ok(StagedDir {
            partial,
            target: target.into(),
            committed: false,
        })
    }

    /// Where to write until the commit.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Syncs the directory and puts it in place, replacing an earlier result.
    pub fn commit(mut self) -> Result<(), FormatError> {
        sync_dir(&self.partial)?;
        let old = sibling(&self.target, "old");
        if old.exists() {
            fs::remove_dir_all(&old).map_err(FormatError::io(&old))?;
        }
        if self.target.exists() {
            fs::rename(&self.target, &old).map_err(FormatError::io(&self.target))?;
        }
        fs::rename(&self.partial, &self.target).map_err(FormatError::io(&self.target))?;
        self.committed = true;
        if old.exists() {
            fs::remove_dir_all(&old).map_err(FormatError::io(&old))?;
        }
        match self.target.parent() {
            Some(parent) if parent != Path::new("") => sync_dir(parent),
            _ => Ok(()),
        }
    }
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing useful can be done about a failure while unwinding from another.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

fn sibling(target: &Path, suffix: &str) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push(".");
    name.push(suffix);
    target.with_file_name(name)
}

fn sync_dir(dir: &Path) -> Result<(), FormatError> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(FormatError::io(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_appears_only_on_commit_and_replaces_an_earlier_result() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("main");
        for text in ["one", "two"] {
            let staged = StagedDir::create(&target).unwrap();
            fs::write(staged.path().join(MARKER), text).unwrap();
            staged.commit().unwrap();
            assert_eq!(fs::read_to_string(target.join(MARKER)).unwrap(), text);
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_abandoned_directory_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let staged = StagedDir::create(&root.path().join("main")).unwrap();
        fs::write(staged.path().join("half"), "x").unwrap();
        drop(staged);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_of_something_else_is_refused() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("thesis.tex"), "x").unwrap();
        assert!(matches!(
            StagedDir::create(root.path()),
            Err(FormatError::Occupied { .. })
        ));
    }
}
