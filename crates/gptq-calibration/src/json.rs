//! Rows of a JSON file while it is parsed: a list, one object with a list, or objects one after the
//! other, as in JSON lines.

use std::cell::Cell;
use std::io::{self, Read};
use std::ops::ControlFlow;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::CalibrationError;
use crate::lenient_json::mend;
use crate::row::{EachRow, Row, text_row};
use crate::source_file::SourceFile;
use crate::value::Value;

/// Bytes read at once while looking for the end of the first object.
const PIECE: u64 = 1 << 16;

/// Byte-order mark that some programs write before UTF-8 text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Beginning of a file.
#[derive(Default)]
pub(crate) struct Opening {
    /// The first bytes, without a byte-order mark; the file continues after them.
    pub bytes: Vec<u8>,
    /// True if the first object is followed by another value: then each value is a row, even one
    /// that holds a list.
    pub is_rows: bool,
}

/// Reads until the layout of the file's rows is known, at most `most` bytes and one piece: a longer
/// object is not a row.
pub(crate) fn look(reader: &mut impl Read, most: u64) -> io::Result<Opening> {
    let mut bytes = Vec::new();
    let mut scan = Scan::default();
    loop {
        let from = bytes.len();
        let read = reader.take(PIECE).read_to_end(&mut bytes)?;
        if from == 0 && bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.drain(..BYTE_ORDER_MARK.len());
        }
        let found = (bytes.iter().skip(from)).find_map(|&byte| scan.step(byte));
        if found.is_some() || read == 0 || bytes.len() as u64 > most {
            let is_rows = found.unwrap_or(false);
            return Ok(Opening { bytes, is_rows });
        }
    }
}

/// Finds what follows the first object. The parser checks whether that object is well-formed.
#[derive(Default)]
struct Scan {
    /// Number of open braces and brackets.
    depth: usize,
    in_text: bool,
    escaped: bool,
    is_past_object: bool,
}

impl Scan {
    /// Returns whether the first object is followed by another value, once known.
    fn step(&mut self, byte: u8) -> Option<bool> {
        if self.in_text {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_text = false,
                _ => {}
            }
            return None;
        }
        match byte {
            byte if byte.is_ascii_whitespace() => return None,
            _ if self.is_past_object => return Some(true),
            b'{' => self.depth += 1,
            // The file does not begin with an object.
            _ if self.depth == 0 => return Some(false),
            b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            b'"' => self.in_text = true,
            _ => {}
        }
        self.is_past_object = self.depth == 0;
        None
    }
}

/// Calls `each` with every value of the file until it breaks.
pub(crate) fn read_rows(
    reader: impl Read,
    file: &SourceFile,
    each: &mut EachRow<'_>,
) -> Result<ControlFlow<()>, CalibrationError> {
    let values = serde_json::Deserializer::from_reader(reader).into_iter::<Value>();
    for (index, value) in values.enumerate() {
        let row = value.map_err(|e| e.to_string()).and_then(as_row);
        let row = row.map_err(|why| file.malformed(format!("row {index}: {why}")))?;
        if each(row)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// Calls `each` with every element of the file's list until it breaks.
pub(crate) fn read_list(
    reader: impl Read,
    file: &SourceFile,
    each: &mut EachRow<'_>,
) -> Result<ControlFlow<()>, CalibrationError> {
    let mut rows = Rows {
        each,
        stopped: None,
        lists: 0,
        rows: 0,
    };
    let mut parser = serde_json::Deserializer::from_reader(reader);
    let parsed = parser
        .deserialize_any(&mut rows)
        .and_then(|()| parser.end());
    match rows.stopped {
        Some(stopped) => stopped.map(ControlFlow::Break),
        None => match parsed {
            Err(error) if rows.lists == 1 => {
                let index = rows.rows;
                Err(file.malformed(format!("row {index}: {error}")))
            }
            Err(error) => Err(file.malformed(format!("not a list of rows: {error}"))),
            Ok(()) if rows.lists == 0 => Err(file.malformed("an object without a list of rows")),
            Ok(()) => Ok(ControlFlow::Continue(())),
        },
    }
}

/// Parses an object as a row; unpaired surrogates are replaced and counted in `mended`. The error
/// is a sentence.
pub(crate) fn row(text: &str, mended: &Cell<usize>) -> Result<Row, String> {
    // Nearly every line parses at the first attempt.
    let value = serde_json::from_str(text).or_else(|_| {
        let (text, count) = mend(text.as_bytes());
        mended.set(mended.get() + count);
        serde_json::from_slice(&text)
    });
    value.map_err(|e| e.to_string()).and_then(as_row)
}

/// Describes the kind of a value within a sentence.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn as_row(value: Value) -> Result<Row, String> {
    match value {
        Value::Object(row) => Ok(row),
        Value::String(text) => Ok(text_row(text)),
        _ => Err("a row is neither an object nor a text".into()),
    }
}

/// Visits the top level of the file. A parser can only be stopped with an error: the reason is
/// stored in `stopped`, and the error is dropped.
struct Rows<'a, 'b> {
    each: &'a mut EachRow<'b>,
    stopped: Option<Result<(), CalibrationError>>,
    lists: usize,
    /// Number of rows passed to `each`.
    rows: usize,
}

impl<'de> Visitor<'de> for &mut Rows<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list, or one object with a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        self.lists += 1;
        if self.lists > 1 {
            return Err(A::Error::custom("the object holds more than one list"));
        }
        while let Some(value) = list.next_element::<Value>()? {
            let row = as_row(value).map_err(A::Error::custom)?;
            self.rows += 1;
            let stopped = match (self.each)(row) {
                Ok(ControlFlow::Continue(())) => continue,
                Ok(ControlFlow::Break(())) => Ok(()),
                Err(error) => Err(error),
            };
            self.stopped = Some(stopped);
            return Err(A::Error::custom("stopped"));
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        while object.next_key::<IgnoredAny>()?.is_some() {
            object.next_value_seed(Member(&mut *self))?;
        }
        Ok(())
    }
}

/// A member of the top-level object: rows if it is a list, otherwise skipped.
struct Member<'r, 'a, 'b>(&'r mut Rows<'a, 'b>);

impl<'de> DeserializeSeed<'de> for Member<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, value: D) -> Result<(), D::Error> {
        value.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Member<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("any value")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<(), A::Error> {
        self.0.visit_seq(list)
    }

    fn visit_map<A: MapAccess<'de>>(self, object: A) -> Result<(), A::Error> {
        IgnoredAny.visit_map(object).map(drop)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }
}
