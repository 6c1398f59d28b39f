//! A directory that appears under its name only when it is complete.
//!
//! Files are written into a `.partial` sibling; [`StagedDir::commit`] syncs it and renames it into
//! place. Until then the sibling stays, whatever happens to the process, so that an interrupted run
//! can resume in it.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::FormatError;

/// File that marks a directory as written by this project, so that it may be replaced.
const MARKER: &str = "report.json";

/// Suffix of a directory until it is complete.
pub(crate) const PARTIAL: &str = "partial";
/// Suffix of a directory that is being replaced.
pub(crate) const OLD: &str = "old";

/// A directory being written.
#[derive(Debug)]
pub struct StagedDir {
    partial: PathBuf,
    target: PathBuf,
}

impl StagedDir {
    /// Refuses an existing target that is neither empty nor an earlier result, or that is a
    /// symbolic link.
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

    /// Starts `target` from scratch; a `.partial` of an interrupted run is removed.
    pub fn create(target: &Path) -> Result<Self, FormatError> {
        Self::check(target)?;
        Self::discard(target)?;
        let partial = sibling(target, PARTIAL);
        if let Some(parent) = partial.parent() {
            fs::create_dir_all(parent).map_err(FormatError::io(parent))?;
        }
        // Fails if anything exists there by now, including a link.
        fs::create_dir(&partial).map_err(FormatError::io(&partial))?;
        Ok(StagedDir {
            partial,
            target: target.into(),
        })
    }

    /// Returns true if an interrupted run left a `.partial` of `target`.
    pub fn is_begun(target: &Path) -> bool {
        fs::symlink_metadata(sibling(target, "partial")).is_ok_and(|meta| meta.is_dir())
    }

    /// Resumes with the `.partial` of an interrupted run.
    ///
    /// # Errors
    /// It does not exist, or is not a directory.
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

    /// Removes the `.partial` of `target`, if there is one; of a link, only the link itself.
    pub fn discard(target: &Path) -> Result<(), FormatError> {
        remove(&sibling(target, PARTIAL))
    }

    /// Returns the directory to write to until the commit.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Syncs its own directory entry and those of its files.
    pub fn sync(&self) -> Result<(), FormatError> {
        sync_dir(&self.partial)?;
        match self.partial.parent() {
            Some(parent) if parent != Path::new("") => sync_dir(parent),
            _ => Ok(()),
        }
    }

    /// Removes the remains of an interrupted replacement beside a finished `target`.
    pub fn tidy(target: &Path) -> Result<(), FormatError> {
        Self::discard(target)?;
        remove(&sibling(target, OLD))
    }

    /// Syncs the directory and moves it into place, replacing an earlier result. If the file system
    /// can exchange two directories, one of the two exists under the name at any moment.
    ///
    /// # Errors
    /// Another program has created the target since: both directories stay as they are.
    pub fn commit(self) -> Result<(), FormatError> {
        sync_dir(&self.partial)?;
        let (partial, target) = (&self.partial, &self.target);
        let taken = || FormatError::Taken {
            dir: target.clone(),
            partial: partial.clone(),
        };
        let old = sibling(target, OLD);
        remove(&old)?;
        if fs::symlink_metadata(target).is_ok() {
            Self::check(target).map_err(|_| taken())?;
            match exchange(partial, target).map_err(FormatError::io(target))? {
                true => {
                    // Checks again what was exchanged, as it may have changed since the first
                    // check.
                    if Self::check(partial).is_err() {
                        exchange(partial, target).map_err(FormatError::io(target))?;
                        return Err(taken());
                    }
                    // Under the name `.old` it is not mistaken for an interrupted run.
                    fs::rename(partial, &old).map_err(FormatError::io(partial))?;
                }
                false => {
                    fs::rename(target, &old).map_err(FormatError::io(target))?;
                    fs::rename(partial, target).map_err(FormatError::io(target))?;
                }
            }
        } else {
            // Replaces at most an empty directory.
            fs::rename(partial, target).map_err(|error| match error.kind() {
                ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory => taken(),
                _ => FormatError::io(target)(error),
            })?;
        }
        match target.parent() {
            Some(parent) if parent != Path::new("") => sync_dir(parent)?,
            _ => {}
        }
        remove(&old)
    }
}

/// Exchanges the names of two directories atomically; returns `false` if that is not supported.
fn exchange(one: &Path, other: &Path) -> io::Result<bool> {
    match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        // An old kernel, or a file system that does not support it for these two.
        Err(Errno::NOSYS | Errno::INVAL | Errno::NOTSUP | Errno::XDEV | Errno::PERM) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Removes a directory and its contents, or a link.
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

/// Syncs the entries of `dir`.
fn sync_dir(dir: &Path) -> Result<(), FormatError> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(FormatError::io(dir))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};

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
    fn what_has_come_to_be_there_meanwhile_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("main");
        for earlier in [false, true] {
            if earlier {
                fs::create_dir(&target).unwrap();
                fs::write(target.join(MARKER), "earlier").unwrap();
            }
            let staged = StagedDir::create(&target).unwrap();
            fs::write(staged.path().join(MARKER), "new").unwrap();
            let _ = fs::remove_dir_all(&target);
            fs::create_dir(&target).unwrap();
            fs::write(target.join("thesis.tex"), "mine").unwrap();
            let partial = staged.path().to_owned();
            let error = staged.commit().unwrap_err().to_string();
            for dir in [&target, &partial] {
                assert!(error.contains(&dir.display().to_string()), "{error}");
            }
            assert_eq!(fs::read(target.join("thesis.tex")).unwrap(), b"mine");
            assert_eq!(fs::read(partial.join(MARKER)).unwrap(), b"new");
            // Once the other directory is gone, the run can be resumed.
            fs::remove_dir_all(&target).unwrap();
            StagedDir::reopen(&target).unwrap().commit().unwrap();
            assert_eq!(fs::read(target.join(MARKER)).unwrap(), b"new");
            fs::remove_dir_all(&target).unwrap();
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn there_is_no_moment_without_a_branch_while_one_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| root.path().join(name));
        for dir in [&one, &other] {
            fs::create_dir(dir).unwrap();
        }
        if !exchange(&one, &other).unwrap() {
            return;
        }
        let target = root.path().join("main");
        let make = || {
            let staged = StagedDir::create(&target).unwrap();
            fs::write(staged.path().join(MARKER), "x").unwrap();
            staged.commit().unwrap();
        };
        make();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let mut missing = 0;
                while !done.load(Ordering::Relaxed) {
                    missing += usize::from(!target.join(MARKER).exists());
                }
                missing
            });
            (0..300).for_each(|_| make());
            done.store(true, Ordering::Relaxed);
            assert_eq!(watch.join().unwrap(), 0);
        });
    }

    /// Some of the three directories remain if the process is killed while replacing a branch; the
    /// next commit leaves only the new one.
    #[test]
    fn whatever_a_kill_left_of_a_replacement_the_next_commit_leaves_one_directory() {
        for left in 0..8 {
            let root = tempfile::tempdir().unwrap();
            let target = root.path().join("main");
            let dirs = [
                target.clone(),
                sibling(&target, PARTIAL),
                sibling(&target, OLD),
            ];
            for (i, dir) in dirs.iter().enumerate().filter(|(i, _)| left >> i & 1 == 1) {
                fs::create_dir(dir).unwrap();
                fs::write(dir.join(MARKER), i.to_string()).unwrap();
            }
            // Resumes if there is a `.partial`.
            let staged = match StagedDir::reopen(&target) {
                Ok(staged) => staged,
                Err(_) => StagedDir::create(&target).unwrap(),
            };
            fs::write(staged.path().join(MARKER), "new").unwrap();
            staged.commit().unwrap();
            assert_eq!(fs::read(target.join(MARKER)).unwrap(), b"new", "{left}");
            assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "{left}");
        }
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
