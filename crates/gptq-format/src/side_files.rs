//! JSON files, and files of a model directory that are copied into branches.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{FormatError, make_public, python_json, write_file};

/// Files of a tokenizer, its chat templates or generation settings. `config.json` is not among
/// them: `quantization_config` is added to it.
const NAMES: [&str; 12] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
];

/// The same by the beginning and end of names: `vocab.json`, `tokenizer.model.v3`, `spiece.model`,
/// `qwen.tiktoken`.
const BEGINNINGS: [&str; 3] = ["vocab.", "tokenizer.model", "sentencepiece."];
const ENDINGS: [&str; 3] = [".model", ".tiktoken", ".spm"];

/// Words in the names of licences, notices and terms of use; `LICENSE`, `Notice.txt`, `USE_POLICY.md`.
const LEGAL: [&str; 9] = [
    "license",
    "licence",
    "notice",
    "copying",
    "copyright",
    "third_party",
    "use_policy",
    "acceptable_use",
    "responsible_use",
];

/// Extensions of code, weights and data, which are never copied.
const OTHER: [&str; 12] = [
    ".bin",
    ".gguf",
    ".h5",
    ".ipynb",
    ".jsonl",
    ".msgpack",
    ".onnx",
    ".parquet",
    ".pt",
    ".pth",
    ".py",
    ".safetensors",
];

/// Subdirectories whose files are copied.
const DIRECTORIES: [&str; 2] = ["additional_chat_templates", "LICENSES"];

/// JSON files whose strings are tokens: they hold no local paths, and are copied byte for byte.
const VOCABULARIES: [&str; 4] = [
    "added_tokens.json",
    "tekken.json",
    "tokenizer.json",
    "vocab.json",
];

/// Maximum size of a JSON file in bytes: parsed, it may take twenty times as much memory. The index
/// of a model of a trillion parameters has about 10 MB.
pub const MAX_JSON: u64 = 32 << 20;
/// Most bytes of a branch's `report.json`, with room for 128 experts in each of 94 blocks.
pub const MAX_REPORT: u64 = 256 << 20;
/// Maximum size of a copied file in bytes; the largest `tokenizer.json` in use have about 35 MB.
const MAX_SIDE_FILE: u64 = 256 << 20;

/// Reads a JSON file. A number that only Python's JSON has becomes the object that Transformers 5
/// writes in its place: `{"__float__": "NaN"}`.
///
/// # Errors
/// A file that cannot be read, is not a regular file, is over 32 MiB, or does not parse.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, FormatError> {
    read_json_within(path, MAX_JSON)
}

/// Reads a JSON file of at most `limit` bytes, as [`read_json`] does.
///
/// # Errors
/// Those of [`read_json`], with this limit.
pub fn read_json_within<T: DeserializeOwned>(path: &Path, limit: u64) -> Result<T, FormatError> {
    parse_json(path, &read_regular(path, limit)?)
}

fn parse_json<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, FormatError> {
    let parsed = serde_json::from_slice(bytes).or_else(|error| match python_json::tagged(bytes) {
        Some(bytes) => serde_json::from_slice(&bytes),
        None => Err(error),
    });
    parsed.map_err(|source| FormatError::Json {
        path: path.into(),
        source,
    })
}

/// Writes a JSON file, indented, with a final newline, using [`write_file`].
///
/// # Errors
/// A file too large for [`read_json`], and errors of [`write_file`].
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), FormatError> {
    write_json_within(path, value, MAX_JSON)
}

/// Writes a JSON file of at most `limit` bytes, as [`write_json`] does.
///
/// # Errors
/// Those of [`write_json`], with this limit.
pub fn write_json_within(
    path: &Path,
    value: &impl Serialize,
    limit: u64,
) -> Result<(), FormatError> {
    write_file(path, &json_text(path, value, limit)?)
}

fn json_text(path: &Path, value: &impl Serialize, limit: u64) -> Result<Vec<u8>, FormatError> {
    let text = serde_json::to_vec_pretty(value);
    let mut text = text.map_err(|source| FormatError::Json {
        path: path.into(),
        source,
    })?;
    text.push(b'\n');
    let length = text.len() as u64;
    match length > limit {
        true => Err(FormatError::Malformed {
            path: path.into(),
            reason: over(length, limit),
        }),
        false => Ok(text),
    }
}

/// Reads a regular file of at most `limit` bytes: a device reports a size of zero and may never
/// end.
fn read_regular(path: &Path, limit: u64) -> Result<Vec<u8>, FormatError> {
    let malformed = |reason| FormatError::Malformed {
        path: path.into(),
        reason,
    };
    // Checked before opening, as opening a pipe would block.
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

/// Returns true if a file of a model's directory is copied into branches, by its name, with `/`
/// after a subdirectory's.
pub fn goes_along(name: &str) -> bool {
    let any = |words: &[&str], test: &dyn Fn(&str) -> bool| words.iter().any(|word| test(word));
    if let Some((dir, file)) = name.split_once('/') {
        let plain = !file.contains('/') && !file.starts_with('.');
        return DIRECTORIES.contains(&dir) && plain && !file.ends_with(".py");
    }
    let lower = name.to_ascii_lowercase().replace(['-', ' '], "_");
    NAMES.contains(&name)
        || (any(&BEGINNINGS, &|word| name.starts_with(word))
            || any(&ENDINGS, &|word| name.ends_with(word))
            || any(&LEGAL, &|word| lower.contains(word)))
            && !any(&OTHER, &|word| lower.ends_with(word))
}

/// Returns the names of the copied files of `dir`, sorted, with `/` after a subdirectory's.
///
/// # Errors
/// A directory that cannot be read.
pub fn side_files(dir: &Path) -> Result<Vec<String>, FormatError> {
    let mut found = names(dir)?;
    for inside in DIRECTORIES {
        let path = dir.join(inside);
        if path.is_dir() {
            let names = names(&path)?.into_iter();
            found.extend(names.map(|name| format!("{inside}/{name}")));
        }
    }
    found.retain(|name| goes_along(name));
    found.sort();
    Ok(found)
}

fn names(dir: &Path) -> Result<Vec<String>, FormatError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(FormatError::io(dir))? {
        let name = entry.map_err(FormatError::io(dir))?.file_name();
        names.extend(name.into_string());
    }
    Ok(names)
}

/// Returns the contents of one of the [`side_files`] of `dir`; `None` if it is missing. Its
/// contents are published with branches, so a link may point only to a file of `dir` itself or of a
/// Hub cache.
///
/// # Errors
/// A link to anything else, a file that is not regular, or one of over 256 MiB.
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

/// Returns true if a file is in a Hub cache: `blobs/HASH` beside `snapshots`, whose links point to
/// it.
fn is_blob(path: &Path) -> bool {
    let Some(blobs) = path.parent() else {
        return false;
    };
    blobs.ends_with("blobs") && blobs.with_file_name("snapshots").is_dir()
}

/// Copies the [`side_files`] of `from` into `to`, byte for byte except for JSON settings with
/// private parts ([`make_public`]).
///
/// # Errors
/// Errors of [`side_file`], JSON settings that do not parse, or files that cannot be written.
pub fn copy_side_files(from: &Path, to: &Path) -> Result<(), FormatError> {
    for name in side_files(from)? {
        // Reads and writes instead of `fs::copy`: a read-only original must not make a read-only
        // copy.
        let Some(mut bytes) = side_file(from, &name)? else {
            continue;
        };
        let path = to.join(&name);
        if name.ends_with(".json") && !VOCABULARIES.contains(&name.as_str()) {
            let mut value: Value = parse_json(&from.join(&name), &bytes)?;
            if !make_public(&mut value).is_nothing() {
                bytes = json_text(&path, &value, MAX_JSON)?;
            }
        }
        match name.split_once('/') {
            None => write_file(&path, &bytes)?,
            Some((dir, _)) => {
                let dir = to.join(dir);
                fs::create_dir_all(&dir).map_err(FormatError::io(&dir))?;
                write_file(&path, &bytes)?;
                // The subdirectory's entries are not synced with those of `to`.
                let synced = File::open(&dir).and_then(|dir| dir.sync_all());
                synced.map_err(FormatError::io(&dir))?;
            }
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
        // The model directory itself may be a link.
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
        // A directory whose name only looks like a cache's.
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
    fn tokenizers_templates_and_licences_go_along_under_all_their_names() {
        let along = [
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer.model.v3",
            "tekken.json",
            "qwen.tiktoken",
            "vocab.json",
            "vocab.txt",
            "merges.txt",
            "spiece.model",
            "sentencepiece.bpe.model",
            "added_tokens.json",
            "special_tokens_map.json",
            "processor_config.json",
            "preprocessor_config.json",
            "chat_template.json",
            "chat_template.jinja",
            "additional_chat_templates/tool_use.jinja",
            "generation_config.json",
            "LICENSE",
            "LICENSE.txt",
            "license.md",
            "LICENCE",
            "Licence.pdf",
            "LICENSE-MODEL",
            "MODEL_LICENSE",
            "Tongyi Qianwen LICENSE AGREEMENT",
            "COPYING",
            "COPYING.LESSER",
            "NOTICE",
            "Notice.txt",
            "THIRD_PARTY_NOTICES.md",
            "third-party.txt",
            "USE_POLICY.md",
            "LICENSES/MIT.txt",
        ];
        for name in along {
            assert!(goes_along(name), "{name}");
        }
        let stay = [
            "config.json",
            "README.md",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "modeling_x.py",
            "tokenization_x.py",
            "license_check.py",
            "quantize_config.json",
            "report.json",
            "verify.json",
            "runs/LICENSE",
            "additional_chat_templates/a/b.jinja",
            "additional_chat_templates/x.py",
            "LICENSES/.git",
            "trainer_state.json",
            "optimizer.pt",
        ];
        for name in stay {
            assert!(!goes_along(name), "{name}");
        }
    }

    #[test]
    fn settings_are_copied_without_what_is_not_to_be_published() {
        let root = tempfile::tempdir().unwrap();
        let (from, to) = (root.path().join("from"), root.path().join("to"));
        fs::create_dir_all(from.join("additional_chat_templates")).unwrap();
        fs::create_dir(&to).unwrap();
        let write = |name: &str, text: &str| fs::write(from.join(name), text).unwrap();
        write(
            "additional_chat_templates/tool_use.jinja",
            "{{ '/home/me/x' }}",
        );
        write("tokenizer.json", r#"{"model": {"vocab": {"/usr/bin": 0}}}"#);
        let public = "{\"eos_token\":   \"</s>\"}";
        write("special_tokens_map.json", public);
        write(
            "tokenizer_config.json",
            r#"{"tokenizer_file": "/home/me/t.json", "a": 1, "b": NaN}"#,
        );
        copy_side_files(&from, &to).unwrap();
        let copied = |name: &str| fs::read_to_string(to.join(name)).unwrap();
        for name in ["additional_chat_templates/tool_use.jinja", "tokenizer.json"] {
            assert_eq!(copied(name), fs::read_to_string(from.join(name)).unwrap());
        }
        assert_eq!(copied("special_tokens_map.json"), public);
        let settings: Value = serde_json::from_str(&copied("tokenizer_config.json")).unwrap();
        assert_eq!(
            settings,
            serde_json::json!({"a": 1, "b": {"__float__": "NaN"}})
        );
        write("generation_config.json", "{");
        let line = copy_side_files(&from, &to).unwrap_err().to_string();
        assert!(line.contains("generation_config.json"), "{line}");
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
