//! Formats values as Python does: `str`, `repr` and floating-point numbers.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

use super::view::View;

/// Bytes of text per step of fuel.
const BYTES_A_STEP: usize = 64;

/// Text whose growth costs fuel: a short template may print a value many times.
pub(super) struct Text<'s, 't, 'e> {
    state: &'s State<'t, 'e>,
    text: String,
    unpaid: usize,
}

impl<'s, 't, 'e> Text<'s, 't, 'e> {
    pub(super) fn new(state: &'s State<'t, 'e>) -> Self {
        Text {
            state,
            text: String::new(),
            unpaid: 0,
        }
    }

    pub(super) fn push(&mut self, text: &str) -> Result<(), Error> {
        self.unpaid += text.len();
        if self.unpaid >= BYTES_A_STEP {
            let steps = self.unpaid / BYTES_A_STEP;
            self.state.consume_fuel(steps as u64)?;
            self.unpaid %= BYTES_A_STEP;
        }
        self.text.push_str(text);
        Ok(())
    }

    /// `str(value)`.
    pub(super) fn push_str(&mut self, value: &Value) -> Result<(), Error> {
        match value.as_str() {
            Some(text) => self.push(text),
            None if value.is_undefined() => Ok(()),
            None => self.push_repr(value),
        }
    }

    /// `repr(value)`.
    pub(super) fn push_repr(&mut self, value: &Value) -> Result<(), Error> {
        if let Some(view) = value.downcast_object_ref::<View>() {
            self.push(view.name())?;
            self.push("(")?;
            self.push_items("[", value, "]")?;
            return self.push(")");
        }
        match value.kind() {
            ValueKind::Undefined => self.push("Undefined"),
            ValueKind::String => self.push_quoted(value.as_str().unwrap_or_default()),
            ValueKind::Number => match float(value) {
                Some(number) => self.push(&float_text(number, "inf", "nan")),
                None => self.push(&value.to_string()),
            },
            ValueKind::Seq if value.is_tuple() => {
                let end = if value.len() == Some(1) { ",)" } else { ")" };
                self.push_items("(", value, end)
            }
            ValueKind::Seq | ValueKind::Iterable => self.push_items("[", value, "]"),
            ValueKind::Map if is_dict(value) => {
                self.push("{")?;
                for (i, key) in value.try_iter()?.enumerate() {
                    if i > 0 {
                        self.push(", ")?;
                    }
                    self.push_repr(&key)?;
                    self.push(": ")?;
                    self.push_repr(&value.get_item(&key)?)?;
                }
                self.push("}")
            }
            _ => self.push(&value.to_string()),
        }
    }

    fn push_items(&mut self, open: &str, value: &Value, close: &str) -> Result<(), Error> {
        self.push(open)?;
        for (i, item) in value.try_iter()?.enumerate() {
            if i > 0 {
                self.push(", ")?;
            }
            self.push_repr(&item)?;
        }
        self.push(close)
    }

    /// Writes a quoted string, with characters escaped that Python does not print.
    fn push_quoted(&mut self, text: &str) -> Result<(), Error> {
        let quote = match text.contains('\'') && !text.contains('"') {
            true => "\"",
            false => "'",
        };
        self.push(quote)?;
        let mut buffer = [0; 4];
        for c in text.chars() {
            match c {
                '\\' => self.push("\\\\")?,
                '\n' => self.push("\\n")?,
                '\r' => self.push("\\r")?,
                '\t' => self.push("\\t")?,
                '\'' if quote == "'" => self.push("\\'")?,
                c if is_printable(c) => self.push(c.encode_utf8(&mut buffer))?,
                c => {
                    let code = u32::from(c);
                    self.push(&match code {
                        0..=0xff => format!("\\x{code:02x}"),
                        0x100..=0xffff => format!("\\u{code:04x}"),
                        _ => format!("\\U{code:08x}"),
                    })?;
                }
            }
        }
        self.push(quote)
    }

    pub(super) fn finish(self) -> String {
        self.text
    }
}

/// `str(value)`.
pub(super) fn str_of(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    let mut text = Text::new(state);
    text.push_str(value)?;
    Ok(text.finish())
}

/// Returns the number if it is a floating-point one.
pub(super) fn float(value: &Value) -> Option<f64> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float
        .then(|| f64::try_from(value.clone()).ok())
        .flatten()
}

/// Returns the shortest digits that read back as this number, with an exponent from 1e16 and below
/// 1e-4.
pub(super) fn float_text(number: f64, infinity: &str, nan: &str) -> String {
    if number.is_nan() {
        return nan.to_owned();
    }
    if number.is_infinite() {
        let sign = if number < 0.0 { "-" } else { "" };
        return format!("{sign}{infinity}");
    }
    let shortest = format!("{number:e}");
    let (digits, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    match exponent.parse::<i32>().unwrap_or(0) {
        -4..16 => {
            let plain = number.to_string();
            match plain.contains('.') {
                true => plain,
                false => plain + ".0",
            }
        }
        exponent => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
    }
}

/// Python's `str.isprintable`; Rust uses the same definition.
fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return matches!(c, ' '..='~');
    }
    // After another character, only unprintable ones are escaped.
    let mut buffer = [b'a'; 5];
    let end = c.encode_utf8(&mut buffer[1..]).len() + 1;
    let text = buffer
        .get(..end)
        .and_then(|text| std::str::from_utf8(text).ok());
    text.is_some_and(|text| text.escape_debug().count() == 2)
}

/// Returns true for a dict; namespaces, loops and macros have members too.
pub(super) fn is_dict(value: &Value) -> bool {
    value.kind() == ValueKind::Map
        && value
            .as_object()
            .is_some_and(|object| object.type_name().contains("Map<"))
}

/// Makes an error that refuses an operation.
pub(super) fn refusal(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

/// Returns Python's name for the type of a value.
pub(super) fn type_name(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Undefined => "Undefined",
        ValueKind::None => "NoneType",
        ValueKind::Bool => "bool",
        ValueKind::Number if value.is_integer() => "int",
        ValueKind::Number => "float",
        ValueKind::String => "str",
        ValueKind::Seq if value.is_tuple() => "tuple",
        ValueKind::Seq | ValueKind::Iterable => "list",
        ValueKind::Map if is_dict(value) => "dict",
        _ => "object",
    }
}
