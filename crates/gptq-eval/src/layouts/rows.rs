//! Rows of JSON files, and their cells.

use std::ops::ControlFlow;
use std::path::Path;

use gptq_calibration::{Map, Source, Value};

use crate::EvalError;

/// Most rows of a file, and most bytes of text in them.
const MAX_ROWS: usize = 1 << 20;
const MAX_TEXT: usize = 256 << 20;

/// Reads every row of a file of JSON, JSON lines or CSV, perhaps compressed, numbered from 0.
pub(crate) fn read(path: &Path) -> Result<Vec<(String, Map)>, EvalError> {
    let (mut rows, mut bytes) = (Vec::new(), 0usize);
    let mut full = false;
    Source::Local(path.into()).rows(&[], &mut |row| {
        bytes += row.values().map(text_size).sum::<usize>();
        full = bytes > MAX_TEXT || rows.len() == MAX_ROWS;
        if full {
            return Ok(ControlFlow::Break(()));
        }
        rows.push((format!("row {}", rows.len()), row));
        Ok(ControlFlow::Continue(()))
    })?;
    match (full, rows.is_empty()) {
        (true, _) => Err(EvalError::file(
            path,
            format!("over {MAX_ROWS} rows, or {} MiB of text", MAX_TEXT >> 20),
        )),
        (false, true) => Err(EvalError::file(path, "no rows")),
        (false, false) => Ok(rows),
    }
}

fn text_size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(list) => list.iter().map(text_size).sum(),
        Value::Object(object) => object.values().map(text_size).sum(),
        _ => 8,
    }
}

/// Returns the cell `key` of a row.
pub(crate) fn cell<'a>(
    path: &Path,
    place: &str,
    row: &'a Map,
    key: &str,
) -> Result<&'a Value, EvalError> {
    row.get(key).ok_or_else(|| {
        let keys: Vec<&str> = row.keys().map(String::as_str).take(16).collect();
        let reason = format!("missing; the row has {}", keys.join(", "));
        EvalError::row(path, place, key, reason)
    })
}

/// Returns the text in the cell `key` of a row.
pub(crate) fn text<'a>(
    path: &Path,
    place: &str,
    row: &'a Map,
    key: &str,
) -> Result<&'a str, EvalError> {
    let value = cell(path, place, row, key)?;
    let text = value.as_str();
    text.ok_or_else(|| EvalError::row(path, place, key, format!("{} is not a text", brief(value))))
}

/// Returns the texts in the cell `key` of a row.
pub(crate) fn texts(
    path: &Path,
    place: &str,
    row: &Map,
    key: &str,
) -> Result<Vec<String>, EvalError> {
    let value = cell(path, place, row, key)?;
    let list = value.as_array().and_then(|list| {
        let texts = list.iter().map(|it| Some(it.as_str()?.to_owned()));
        texts.collect::<Option<Vec<String>>>()
    });
    list.ok_or_else(|| {
        EvalError::row(
            path,
            place,
            key,
            format!("{} is not a list of texts", brief(value)),
        )
    })
}

/// Shows the beginning of a value.
pub(crate) fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((at, _)) => format!("{}...", text.get(..at).unwrap_or_default()),
        None => text,
    }
}

/// Returns a file's name up to its first dot.
pub(crate) fn file_stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').next().unwrap_or_default().to_owned()
}
