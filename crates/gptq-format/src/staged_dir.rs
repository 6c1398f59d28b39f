//! A directory that appears under its name only when it is complete.
//!
//! Files are written into a `.partial` sibling; [`StagedDir::commit`] syncs it and renames it into
//! place. Until then the sibling stays where it is, whatever happens to the process: an unfinished
//! run goes on in it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::FormatError;

/// The file whose presence says that a directory was written by this project and may be replaced.
const MARKER: &str = "report.json";

/// What is added to a directory's name until it is complete.
pub(crate) const PARTIAL: &str = "partial";
/// What is added to the name of a directory that is being replaced.
pub(crate) const OLD: &str = "old";

/// A directory being written.
#[derive(Debug)]
pub struct StagedDir {
    partial: PathBuf,
    target: PathBuf,
}

impl StagedDir {
    /// Refuses a target that exists and is neither empty nor an earlier result, or is a symbolic
    /// link.
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

    /// Starts `target` anew; a `.partial` left by a run that died is removed.
    pub fn create(target: &Path) -> Result<Self, FormatError> {
        Self::check(target)?;
        Self::discard(target)?;
        let partial = sibling(target, PARTIAL);
        if let Some(parent) = partial.parent() {
            fs::create_dir_all(parent).map_err(FormatError::io(parent))?;
        }
        // Fails on whatever is there by now, a link included.
        fs::create_dir(&partial).map_err(FormatError::io(&partial))?;
        Ok(StagedDir {
            partial,
            target: target.into(),
        })
    }

    /// Goes on with the `.partial` that an unfinished run left.
    ///
    /// # Errors
    /// There is none, or it is not a directory.
    pub fn reopen(target: &Path) -> Result<Self, FormatError> {
        Self::check(target)?;
        let partial = sibling(target, PARTIAL);
        let meta = fs::symlink_metadata(&partial).map_err(FormatError::io(&partial))?;
        match meta.is_dir() {
            true => Ok(StagedDir {
                partial,
                target: target.into(),
            }),
            false => Err(FormatError::Occupied { dir: partial }),
        }
    }

    /// Removes the `.partial` of `target`, if there is one; a link there goes, not what it leads to.
    pub fn discard(target: &Path) -> Result<(), FormatError> {
        remove(&sibling(target, PARTIAL))
    }

    /// Where to write until the commit.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Waits until its name and those of its files are on the disk.
    pub fn sync(&self) -> Result<(), FormatError> {
        sync_dir(&self.partial)?;
        match self.partial.parent() {
            Some(parent) if parent != Path::new("") => sync_dir(parent),
            _ => Ok(()),
        }
    }

    /// Syncs the directory and puts it in place, replacing an earlier result.
    pub fn commit(self) -> Result<(), FormatError> {
        sync_dir(&self.partial)?;
        let old = sibling(&self.target, OLD);
        remove(&old)?;
        if fs::symlink_metadata(&self.target).is_ok() {
            fs::rename(&self.target, &old).map_err(FormatError::io(&self.target))?;
        }
        fs::rename(&self.partial, &self.target).map_err(FormatError::io(&self.target))?;
        match self.target.parent() {
            Some(parent) if parent != Path::new("") => sync_dir(parent)?,
            _ => {}
        }
        remove(&old)
    }
}

/// Removes a directory with all that is in it, or a link.
fn remove(path: &Path) -> Result<(), FormatError> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    };
    removed.map_err(FormatError::io(path))
}

fn sibling(target: &Path, suffix: &str) -> PathBuf {
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push(".");
    name.push(suffix);
    target.with_file_name(name)
}

/// Waits until the entries of `dir` are on the disk.
fn sync_dir(dir: &Path) -> Result<(), FormatError> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(FormatError::io(dir))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

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
    fn an_abandoned_directory_can_be_gone_on_with_begun_anew_or_discarded() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("main");
        let staged = StagedDir::create(&target).unwrap();
        fs::write(staged.path().join("half"), "x").unwrap();
        drop(staged);
        assert!(!target.exists());
        let again = StagedDir::reopen(&target).unwrap();
        assert!(again.path().join("half").exists());
        let anew = StagedDir::create(&target).unwrap();
        assert!(!anew.path().join("half").exists());
        StagedDir::discard(&target).unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        assert!(StagedDir::reopen(&target).is_err());
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

    #[test]
    fn links_in_the_place_of_a_branch_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let (target, elsewhere) = (root.path().join("main"), root.path().join("elsewhere"));
        fs::create_dir(&elsewhere).unwrap();
        fs::write(elsewhere.join(MARKER), "mine").unwrap();
        for suffix in [PARTIAL, OLD] {
            symlink(&elsewhere, sibling(&target, suffix)).unwrap();
        }
        assert!(StagedDir::reopen(&target).is_err());
        let staged = StagedDir::create(&target).unwrap();
        fs::write(staged.path().join(MARKER), "new").unwrap();
        staged.commit().unwrap();
        symlink(&elsewhere, root.path().join("other")).unwrap();
        assert!(StagedDir::create(&root.path().join("other")).is_err());
        assert_eq!(fs::read_to_string(elsewhere.join(MARKER)).unwrap(), "mine");
    }
}
