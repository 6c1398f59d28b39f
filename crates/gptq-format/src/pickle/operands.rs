//! Operands of opcodes: bytes, lines and numbers; and names of values for messages.

use std::fmt;

use super::{MAX_NAME, Machine, Step, Value};

const TRUNCATED: &str = "its pickle ends in the middle; the file may be truncated";

impl<'a> Machine<'a> {
    pub(super) fn bytes(&mut self, count: usize) -> Step<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(TRUNCATED)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn byte(&mut self) -> Step<u8> {
        self.array().map(|[byte]| byte)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(TRUNCATED)?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(super) fn line(&mut self) -> Step<&'a str> {
        let end = self.rest.iter().take(MAX_NAME).position(|&b| b == b'\n');
        let end = end.ok_or_else(|| format!("its pickle has a name over {MAX_NAME} bytes"))?;
        let line = self.bytes(end)?;
        self.bytes(1)?;
        utf8(line)
    }

    /// Reads a little-endian two's complement number of up to 8 bytes.
    pub(super) fn long(&mut self) -> Step<i64> {
        let [length] = self.array()?;
        let bytes = self.bytes(length.into())?;
        if bytes.len() > 8 {
            return Err("its pickle has an integer over 64 bits".into());
        }
        let sign = bytes
            .last()
            .map_or(0, |b| if b & 0x80 == 0 { 0 } else { 0xff });
        let mut wide = [sign; 8];
        for (wide, byte) in wide.iter_mut().zip(bytes) {
            *wide = *byte;
        }
        Ok(i64::from_le_bytes(wide))
    }
}

pub(super) fn utf8(bytes: &[u8]) -> Step<&str> {
    str::from_utf8(bytes).map_err(|_| "its pickle has a name that is not UTF-8".into())
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::None => f.write_str("None"),
            Value::Bool => f.write_str("a truth value"),
            Value::Int(number) => write!(f, "the number {number}"),
            Value::Float => f.write_str("a fraction"),
            Value::Text(text) => write!(f, "the text {text:?}"),
            Value::List => f.write_str("a list"),
            Value::Global(_) => f.write_str("a class or function"),
            Value::Tuple(..) => f.write_str("a tuple"),
            Value::Dict(_) => f.write_str("a dict"),
            Value::Storage(_) => f.write_str("a storage"),
            Value::Tensor(_) => f.write_str("a tensor"),
        }
    }
}
