//! JSON files, and the files of a model directory that go along untouched.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{FormatError, write_file};

/// What a tokenizer or a generation setting may be spread over. `config.json` is not among them: it
/// gains `quantization_config`.
pub const SIDE_FILES: [&str; 12] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "LICENSE",
];

/// Most bytes of a JSON file that is read: parsed, it may take twenty times as much memory. The index of a
/// model of a trillion parameters has about 10 MB.
pub const MAX_JSON: u64 = 32 << 20;
/// Most bytes of a file that goes along; the largest `tokenizer.json` in use have about 35 MB.
const MAX_SIDE_FILE: u64 = 256 << 20;

/// Reads a JSON file.
///
/// # Errors
/// A file that cannot be read, is not a regular one, is over 32 MiB, or does not parse.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, FormatError> {
    let bytes = read_regular(path, MAX_JSON)?;
    serde_json::from_slice(&bytes).map_err(|source| FormatError::Json {
        path: path.into(),
        source,
    })
}

/// Writes a JSON file, indented, with a final newline, as [`write_file`] does.
///
/// # Errors
/// One that [`read_json`] would not read for its size, and what [`write_file`] says.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), FormatError> {
    let mut text = serde_json::to_string_pretty(value).map_err(|source| FormatError::Json {
        path: path.into(),
        source,
    })?;
    text.push('\n');
    if text.len() as u64 > MAX_JSON {
        return Err(FormatError::Malformed {
            path: path.into(),
            reason: over(text.len() as u64, MAX_JSON),
        });
    }
    write_file(path, text.as_bytes())
}

/// The bytes of a regular file of at most `limit`: a device says that it has none and never ends.
fn read_regular(path: &Path, limit: u64) -> Result<Vec<u8>, FormatError> {
    let malformed = |reason| FormatError::Malformed {
        path: path.into(),
        reason,
    };
    // Before it is opened, as a pipe would wait for whoever writes to it.
    let meta = fs::metadata(path).map_err(FormatError::io(path))?;
    if !meta.is_file() {
        return Err(malformed("not a regular file; put one in its place".into()));
    }
    if meta.len() > limit {
        return Err(malformed(over(meta.len(), limit)));
    }
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
        .map_err(FormatError::io(path))?;
    match bytes.len() as u64 > limit {
        true => Err(malformed(over(limit + 1, limit))),
        false => Ok(bytes),
    }
}

fn over(length: u64, limit: u64) -> String {
    format!("{length} bytes, over the limit of {limit} for such a file")
}

/// The contents of one of the [`SIDE_FILES`] of `dir`; `None` where there is none. What it holds goes into
/// branches that are published, so a link may lead to a file of `dir` itself or of a Hub cache, and
/// nowhere else.
///
/// # Errors
/// A link to anything else, what is not a regular file, and one of over 256 MiB.
pub fn side_file(dir: &Path, name: &str) -> Result<Option<Vec<u8>>, FormatError> {
    let path = dir.join(name);
    let target = match fs::canonicalize(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        found => found.map_err(FormatError::io(&path))?,
    };
    if target.is_dir() {
        return Ok(None);
    }
    let own = fs::canonicalize(dir).map_err(FormatError::io(dir))?;
    if !target.starts_with(own) && !is_blob(&target) {
        let reason = "a link to a file outside the model's directory, which a branch would make public; \
                      put a copy of the file in its place, or remove it";
        return Err(FormatError::Malformed {
            path,
            reason: reason.into(),
        });
    }
    read_regular(&path, MAX_SIDE_FILE).map(Some)
}

/// Whether a file lies in a Hub cache: `blobs/HASH` beside `snapshots`, whose links lead to it.
fn is_blob(path: &Path) -> bool {
    let Some(blobs) = path.parent() else {
        return false;
    };
    blobs.ends_with("blobs") && blobs.with_file_name("snapshots").is_dir()
}

/// Copies the tokenizer and generation files that `from` has into `to`, byte for byte.
///
/// # Errors
/// What [`side_file`] refuses, and what cannot be written.
pub fn copy_side_files(from: &Path, to: &Path) -> Result<(), FormatError> {
    for name in SIDE_FILES {
        // Read and written rather than `fs::copy`: a read-only original must not make a
        // read-only copy.
        if let Some(bytes) = side_file(from, name)? {
            write_file(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_device_in_place_of_a_json_file_is_refused_and_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        symlink("/dev/zero", &path).unwrap();
        let error = read_json::<serde_json::Value>(&path).unwrap_err();
        let line = error.to_string();
        assert!(line.contains("config.json: not a regular file"), "{line}");
    }

    #[test]
    fn a_link_may_lead_to_the_models_own_files_and_a_hub_caches_alone() {
        let root = tempfile::tempdir().unwrap();
        let repo = root.path().join("models--a--b");
        let snapshot = repo.join("snapshots/0123");
        let elsewhere = root.path().join("id_rsa");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir(repo.join("blobs")).unwrap();
        fs::write(repo.join("blobs/abc"), "of the cache").unwrap();
        fs::write(&elsewhere, "secret").unwrap();
        symlink("../../blobs/abc", snapshot.join("tokenizer.json")).unwrap();
        fs::write(snapshot.join("MIT"), "its own").unwrap();
        symlink("MIT", snapshot.join("LICENSE")).unwrap();
        symlink("nowhere", snapshot.join("merges.txt")).unwrap();
        fs::create_dir(snapshot.join("vocab.json")).unwrap();
        // The directory itself may be a link.
        let model = root.path().join("model");
        symlink(&snapshot, &model).unwrap();
        let to = root.path().join("branch");
        fs::create_dir(&to).unwrap();
        copy_side_files(&model, &to).unwrap();
        let copied = |name: &str| fs::read_to_string(to.join(name)).unwrap();
        assert_eq!(copied("tokenizer.json"), "of the cache");
        assert_eq!(copied("LICENSE"), "its own");
        assert_eq!(fs::read_dir(&to).unwrap().count(), 2);

        for target in [
            elsewhere.as_path(),
            Path::new("../../../id_rsa"),
            Path::new("/dev/zero"),
        ] {
            fs::remove_file(snapshot.join("LICENSE")).unwrap();
            symlink(target, snapshot.join("LICENSE")).unwrap();
            let line = copy_side_files(&model, &to).unwrap_err().to_string();
            assert!(
                line.contains("LICENSE: a link") && line.contains("put a copy"),
                "{line}"
            );
        }
        // A directory that is only called like a cache's.
        fs::create_dir(root.path().join("blobs")).unwrap();
        fs::write(root.path().join("blobs/key"), "secret").unwrap();
        fs::remove_file(snapshot.join("LICENSE")).unwrap();
        symlink("../../../blobs/key", snapshot.join("LICENSE")).unwrap();
        assert!(copy_side_files(&model, &to).is_err());
    }

    #[test]
    fn json_that_could_not_be_read_back_is_not_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        let largest = "x".repeat(MAX_JSON as usize - 3);
        write_json(&path, &largest).unwrap();
        assert_eq!(read_json::<String>(&path).unwrap(), largest);
        let line = write_json(&path, &format!("{largest}x")).unwrap_err();
        let line = line.to_string();
        assert!(line.contains("33554433 bytes, over the limit"), "{line}");
        assert_eq!(
            read_json::<String>(&path).unwrap(),
            largest,
            "left as it was"
        );
    }

    #[test]
    fn a_file_that_goes_along_is_refused_over_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("tokenizer.model")).unwrap();
        file.set_len(MAX_SIDE_FILE + 1).unwrap();
        let line = side_file(dir.path(), "tokenizer.model").unwrap_err();
        let line = line.to_string();
        assert!(line.contains("tokenizer.model: 268435457 bytes"), "{line}");
    }
}
