//! Rows of a JSON file as the parser meets them: a list, or one object with a list.

use std::io::Read;
use std::ops::ControlFlow;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::CalibrationError;
use crate::reader::{EachRow, Row, malformed, text_row};
use crate::source::SourceFile;

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
    };
    let mut parser = serde_json::Deserializer::from_reader(reader);
    let parsed = parser
        .deserialize_any(&mut rows)
        .and_then(|()| parser.end());
    match rows.stopped {
        Some(stopped) => stopped.map(ControlFlow::Break),
        None => match parsed {
            Err(error) => Err(malformed(file, format!("not a list of rows: {error}"))),
            Ok(()) if rows.lists == 0 => Err(malformed(file, "an object without a list of rows")),
            Ok(()) => Ok(ControlFlow::Continue(())),
        },
    }
}

/// An object as a row. The error is a sentence.
pub(crate) fn row(text: &str) -> Result<Row, String> {
    serde_json::from_str(text)
        .map_err(|e| e.to_string())
        .and_then(as_row)
}

fn as_row(value: Value) -> Result<Row, String> {
    match value {
        Value::Object(row) => Ok(row),
        Value::String(text) => Ok(text_row(text)),
        _ => Err("a row is neither an object nor a text".into()),
    }
}

/// Visits the top of the file. A parser has no way to stop but an error: why it stopped is kept in
/// `stopped`, and the error is dropped.
struct Rows<'a, 'b> {
    each: &'a mut EachRow<'b>,
    stopped: Option<Result<(), CalibrationError>>,
    lists: usize,
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

/// A member of the top object: rows if it is a list, skipped otherwise.
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
