//! A directory that appears under its name only when it is complete.
//!
//! Files are written into a `.partial` sibling; [`StagedDir::commit`] syncs it and renames it into
//! place. Until then the sibling stays where it is, whatever happens to the process: an unfinished
//! run goes on in it.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

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

    /// Whether an unfinished run left a `.partial` of `target`.
    pub fn is_begun(target: &Path) -> bool {
        fs::symlink_metadata(sibling(target, "partial")).is_ok_and(|meta| meta.is_dir())
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

    /// Removes what a replacement that was cut short left beside a finished `target`.
    pub fn tidy(target: &Path) -> Result<(), FormatError> {
        Self::discard(target)?;
        remove(&sibling(target, OLD))
    }

    /// Syncs the directory and puts it in place, replacing an earlier result. Where the file system can
    /// exchange two directories, there is no moment without one of the two under the name.
    ///
    /// # Errors
    /// Something else has come to be there since the directory was begun: both stay as they are.
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
                    // What was really there, whatever came between the look and the exchange.
                    if Self::check(partial).is_err() {
                        exchange(partial, target).map_err(FormatError::io(target))?;
                        return Err(taken());
                    }
                    // Under this name nobody takes it for a beginning.
                    fs::rename(partial, &old).map_err(FormatError::io(partial))?;
                }
                false => {
                    fs::rename(target, &old).map_err(FormatError::io(target))?;
                    fs::rename(partial, target).map_err(FormatError::io(target))?;
                }
            }
        } else {
            // Replaces nothing but an empty directory.
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

/// Has two directories change their names at once; `false` where that cannot be done.
fn exchange(one: &Path, other: &Path) -> io::Result<bool> {
    match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        // An old kernel; a file system that does not know how, or not for these two.
        Err(Errno::NOSYS | Errno::INVAL | Errno::NOTSUP | Errno::XDEV | Errno::PERM) => Ok(false),
        Err(error) => Err(error.into()),
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
            // Once it is out of the way, the beginning can be gone on with.
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

    /// A kill while a branch is replaced leaves some of the three; whatever it leaves, there is one
    /// directory at the end, the new one.
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
            // To be gone on with where there is a beginning.
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
