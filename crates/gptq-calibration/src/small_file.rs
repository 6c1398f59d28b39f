//! Reads files of a tokenizer, up to a size limit.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::CalibrationError;

/// Maximum size of `tokenizer.json` in bytes; the largest in use have about 35 MB.
pub(crate) const MAX_TOKENIZER: u64 = 128 << 20;
/// Maximum size of `tokenizer_config.json`: one with a thousand added tokens has under 1 MB.
pub(crate) const MAX_CONFIG: u64 = 8 << 20;
/// Maximum size of a chat template; long ones have 20 kB.
pub(crate) const MAX_TEMPLATE: u64 = 64 << 10;

/// Reads the file's bytes.
///
/// # Errors
/// A file that cannot be read, or has over `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, CalibrationError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
        .map_err(CalibrationError::io(path))?;
    match bytes.len() as u64 > limit {
        true => Err(CalibrationError::Malformed {
            path: path.into(),
            reason: format!("over the limit of {limit} bytes for such a file"),
        }),
        false => Ok(bytes),
    }
}

/// Reads `tokenizer_config.json` or a similar file in `dir`; null if it is missing.
///
/// # Errors
/// A file that cannot be read, is over the limit, or is not JSON.
pub(crate) fn config(dir: &Path, name: &str) -> Result<Value, CalibrationError> {
    let path = dir.join(name);
    let bytes = match read(&path, MAX_CONFIG) {
        Err(error) if error.is_missing_file() => return Ok(Value::Null),
        other => other?,
    };
    serde_json::from_slice(&bytes).map_err(|e| CalibrationError::Malformed {
        path,
        reason: e.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ChatTemplate;

    #[test]
    fn files_over_their_limit_are_refused_unread() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read(&path, 5).unwrap(), b"12345");
        let error = read(&path, 4).unwrap_err().to_string();
        assert!(error.contains("limit of 4 bytes"), "{error}");

        let sparse = |name: &str, bytes: u64| {
            let file = File::create(dir.path().join(name)).unwrap();
            file.set_len(bytes).unwrap();
        };
        sparse("tokenizer_config.json", MAX_CONFIG + 1);
        let error = ChatTemplate::of(dir.path()).unwrap_err().to_string();
        assert!(error.contains("limit of 8388608"), "{error}");
        std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
        sparse("chat_template.jinja", MAX_TEMPLATE + 1);
        let error = ChatTemplate::of(dir.path()).unwrap_err().to_string();
        assert!(error.contains("limit of 65536"), "{error}");
        sparse("tokenizer.json", MAX_TOKENIZER + 1);
        let error = crate::TextTokenizer::load(dir.path()).err().unwrap();
        assert!(error.to_string().contains("limit of 134217728"), "{error}");
    }
}
