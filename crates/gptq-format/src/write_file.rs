//! A file that appears under its name only when it is complete.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;

use crate::FormatError;

/// Writes `bytes` to a hidden sibling, syncs it, and renames it to `path`, replacing an existing
/// file. A reader sees the old file or the new one; a symbolic link of that name is replaced, not
/// followed.
///
/// # Errors
/// A directory that cannot be written to, or a full disk; the sibling is removed.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".partial");
    let partial = path.with_file_name(name);
    // A leftover of an interrupted process, or a link: must not be written through.
    match fs::remove_file(&partial) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(FormatError::io(path)(e)),
        _ => {}
    }
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&partial)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&partial, path));
    written.map_err(|e| {
        // Keeps the first error.
        let _ = fs::remove_file(&partial);
        FormatError::io(path)(e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, elsewhere) = (dir.path().join("a.json"), dir.path().join("elsewhere"));
        fs::write(&elsewhere, "mine").unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        std::os::unix::fs::symlink(&elsewhere, dir.path().join(".a.json.partial")).unwrap();
        for text in ["one", "two"] {
            write_file(&path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert!(!fs::symlink_metadata(&path).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "mine");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = write_file(Path::new("/no/such/dir/a.json"), b"x").unwrap_err();
        assert!(error.to_string().contains("/no/such/dir/a.json"), "{error}");
    }
}
