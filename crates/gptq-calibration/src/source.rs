//! Rows from a file.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::CalibrationError;

/// A half-open range of rows, written `"0:1000"`, `"500:"` or `":1000"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowRange {
    start: usize,
    end: Option<usize>,
}

impl FromStr for RowRange {
    type Err = CalibrationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || CalibrationError::Rows { text: text.into() };
        let bound = |text: &str| match text {
            "" => Ok(None),
            n => n.parse().map(Some).map_err(|_| error()),
        };
        let (start, end) = text.split_once(':').ok_or_else(error)?;
        let range = RowRange {
            start: bound(start)?.unwrap_or(0),
            end: bound(end)?,
        };
        match range.end {
            Some(end) if end <= range.start => Err(error()),
            _ => Ok(range),
        }
    }
}

impl fmt::Display for RowRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.start)?;
        self.end.iter().try_for_each(|end| end.fmt(f))
    }
}

/// Rows of a file.
pub(crate) struct Rows {
    /// Each with its number from the start of the file.
    pub rows: Vec<(usize, Map<String, Value>)>,
    /// SHA-256 of the file.
    pub sha256: String,
}

/// Rows of a JSON file that holds one list of objects.
pub(crate) fn read_rows(path: &Path, range: RowRange) -> Result<Rows, CalibrationError> {
    let bytes = fs::read(path).map_err(CalibrationError::io(path))?;
    let rows: Vec<Map<String, Value>> =
        serde_json::from_slice(&bytes).map_err(|e| CalibrationError::Malformed {
            path: path.into(),
            reason: format!("not a JSON list of objects: {e}"),
        })?;
    let available = rows.len();
    let end = range.end.unwrap_or(available).min(available);
    if range.start >= end {
        return Err(CalibrationError::NoRows {
            range: range.to_string(),
            available,
        });
    }
    let rows = rows.into_iter().enumerate();
    Ok(Rows {
        rows: rows.take(end).skip(range.start).collect(),
        sha256: sha256(&bytes),
    })
}

/// Lower-case hexadecimal SHA-256.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Documents for evaluation: a JSON list of texts, or one plain text.
pub(crate) fn read_texts(path: &Path) -> Result<Vec<String>, CalibrationError> {
    let bytes = fs::read(path).map_err(CalibrationError::io(path))?;
    let malformed = |reason: String| CalibrationError::Malformed {
        path: path.into(),
        reason,
    };
    if path.extension().is_some_and(|e| e == "json") {
        return serde_json::from_slice(&bytes)
            .map_err(|e| malformed(format!("not a JSON list of texts: {e}")));
    }
    String::from_utf8(bytes)
        .map(|text| vec![text])
        .map_err(|_| malformed("not UTF-8 text".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_parse_as_they_print_and_wrong_ones_are_refused() {
        for text in ["0:1000", "5:", "7:8"] {
            assert_eq!(text.parse::<RowRange>().unwrap().to_string(), text);
        }
        assert_eq!(":9".parse::<RowRange>().unwrap().to_string(), "0:9");
        for text in ["", "5", "9:9", "9:3", "a:b", "-1:4", "1:2:3"] {
            assert!(text.parse::<RowRange>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_hash_is_the_published_one() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(b"abc"), abc);
    }
}
