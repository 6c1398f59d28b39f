//! JSON files, and the files of a model directory that go along untouched.

use std::fs;
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
const MAX_JSON: u64 = 32 << 20;

/// Reads a JSON file.
///
/// # Errors
/// A file that cannot be read, is over 32 MiB, or does not parse.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, FormatError> {
    let length = fs::metadata(path).map_err(FormatError::io(path))?.len();
    if length > MAX_JSON {
        return Err(FormatError::Malformed {
            path: path.into(),
            reason: format!("{length} bytes, over the limit of {MAX_JSON} for such a file"),
        });
    }
    let bytes = fs::read(path).map_err(FormatError::io(path))?;
    serde_json::from_slice(&bytes).map_err(|source| FormatError::Json {
        path: path.into(),
        source,
    })
}

/// Writes a JSON file, indented, with a final newline, as [`write_file`] does.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), FormatError> {
    let mut text = serde_json::to_string_pretty(value).map_err(|source| FormatError::Json {
        path: path.into(),
        source,
    })?;
    text.push('\n');
    write_file(path, text.as_bytes())
}

/// Copies the tokenizer and generation files that `from` has into `to`, byte for byte.
pub fn copy_side_files(from: &Path, to: &Path) -> Result<(), FormatError> {
    for name in SIDE_FILES {
        let source = from.join(name);
        if source.is_file() {
            let target = to.join(name);
            // Read and written rather than `fs::copy`: a read-only original must not make a
            // read-only copy.
            let bytes = fs::read(&source).map_err(FormatError::io(&source))?;
            write_file(&target, &bytes)?;
        }
    }
    Ok(())
}
