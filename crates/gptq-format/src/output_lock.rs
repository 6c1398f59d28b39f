//! Lock that allows one run at a time on an output directory.
//!
//! The lock is the system's (`flock`) on a file that names the holder, so it is released however
//! the process ends.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::system::uname;
use serde::{Deserialize, Serialize};

use crate::{FormatError, read_json};

const FILE: &str = ".gptq-lock";

/// Lock of an output directory, held until dropped.
#[derive(Debug)]
pub struct OutputLock {
    path: PathBuf,
    _file: File,
    exclusive: bool,
}

/// Contents of the lock file.
#[derive(Serialize, Deserialize)]
struct Holder {
    pid: u32,
    /// Host name: several machines may share a directory.
    #[serde(default)]
    host: Option<String>,
    /// Start time in seconds since 1970.
    since: u64,
}

impl OutputLock {
    /// Locks `dir`, which is created if missing.
    ///
    /// # Errors
    /// The lock is held by another process ([`FormatError::Locked`]), or the directory cannot be
    /// written to.
    pub fn acquire(dir: &Path) -> Result<Self, FormatError> {
        Self::acquire_by(dir, File::try_lock)
    }

    /// Returns true if the lock excludes others; on a file system without locks it only names the
    /// writer.
    pub fn is_exclusive(&self) -> bool {
        self.exclusive
    }

    fn acquire_by(
        dir: &Path,
        try_lock: impl Fn(&File) -> Result<(), TryLockError>,
    ) -> Result<Self, FormatError> {
        fs::create_dir_all(dir).map_err(FormatError::io(dir))?;
        let path = dir.join(FILE);
        let io = |e| FormatError::io(&path)(e);
        loop {
            if fs::symlink_metadata(&path).is_ok_and(|m| !m.is_file()) {
                return Err(FormatError::NotAFile { path });
            }
            let mut file = OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(io)?;
            let exclusive = match try_lock(&file) {
                Ok(()) => true,
                Err(TryLockError::WouldBlock) => return Err(locked(dir, &path)),
                Err(TryLockError::Error(e)) if has_no_locks(&e) => false,
                Err(TryLockError::Error(e)) => return Err(io(e)),
            };
            // The previous holder may have removed the file between the two calls above.
            let ours = file.metadata().map_err(io)?.ino();
            if fs::symlink_metadata(&path).is_ok_and(|m| m.ino() == ours) {
                let now = SystemTime::now().duration_since(UNIX_EPOCH);
                let holder = Holder {
                    pid: std::process::id(),
                    host: Some(uname().nodename().to_string_lossy().into_owned()),
                    since: now.unwrap_or_default().as_secs(),
                };
                let text = serde_json::to_vec(&holder).map_err(|e| io(e.into()))?;
                file.set_len(0)
                    .and_then(|()| file.write_all(&text))
                    .map_err(io)?;
                return Ok(OutputLock {
                    path,
                    _file: file,
                    exclusive,
                });
            }
        }
    }
}

impl Drop for OutputLock {
    fn drop(&mut self) {
        // A file left behind would not block anyone.
        let _ = fs::remove_file(&self.path);
    }
}

/// Some network file systems have no locks, or their lock service does not answer.
fn has_no_locks(error: &io::Error) -> bool {
    error.kind() == ErrorKind::Unsupported
        || error.raw_os_error() == Some(Errno::NOLCK.raw_os_error())
}

fn locked(dir: &Path, path: &Path) -> FormatError {
    // The lock may just be changing hands; then the holder is unknown.
    let holder = read_json::<Holder>(path).ok();
    FormatError::Locked {
        dir: dir.into(),
        holder: match holder {
            None => "another process".to_owned(),
            Some(Holder { pid, host, since }) => {
                let on = host.map_or_else(String::new, |host| format!(" on {host}"));
                let since = UNIX_EPOCH + std::time::Duration::from_secs(since.min(1 << 37));
                let since = humantime::format_rfc3339_seconds(since);
                format!("process {pid}{on} since {since}")
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_told_who_has_it_and_a_dead_ones_file_means_nothing() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("out");
        let first = OutputLock::acquire(&dir).unwrap();
        let error = OutputLock::acquire(&dir).unwrap_err().to_string();
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let holder = format!("process {} on {} since 20", std::process::id(), host.trim());
        assert!(error.contains(&holder), "{error}");
        assert!(first.is_exclusive());
        drop(first);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        // A file left by a killed process.
        fs::write(dir.join(FILE), r#"{"pid": 1, "since": 0}"#).unwrap();
        drop(OutputLock::acquire(&dir).unwrap());
    }

    #[test]
    fn a_file_system_without_locks_holds_nobody_up_and_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let fails = |errno: Errno| Err(TryLockError::Error(errno.into()));
        for errno in [Errno::NOTSUP, Errno::NOLCK, Errno::NOSYS] {
            let lock = OutputLock::acquire_by(dir.path(), |_| fails(errno)).unwrap();
            assert!(!lock.is_exclusive());
        }
        let error = OutputLock::acquire_by(dir.path(), |_| fails(Errno::IO)).unwrap_err();
        assert!(matches!(error, FormatError::Io { .. }), "{error}");
    }

    #[test]
    fn a_lock_that_is_a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = dir.path().join("elsewhere");
        std::os::unix::fs::symlink(&elsewhere, dir.path().join(FILE)).unwrap();
        assert!(matches!(
            OutputLock::acquire(dir.path()),
            Err(FormatError::NotAFile { .. })
        ));
        assert!(!elsewhere.exists());
    }
}
