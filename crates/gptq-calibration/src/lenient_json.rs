//! Converts JSON as Python's `json.dumps` writes it and `json.loads` reads it to strict JSON.
//!
//! | in the file | becomes |
//! |---|---|
//! | `NaN`, `Infinity`, `-Infinity`, a number beyond `f64` such as `1e400` | `null` |
//! | `\ud83d` without its other half | `\ufffd`, counted |
//!
//! Everything else is unchanged, including errors, which are left to the parser.

use std::cell::Cell;
use std::io::{self, BufRead, Read};
use std::rc::Rc;

/// Longest number that is checked; longer ones pass unchanged.
const LONGEST_NUMBER: usize = 1 << 16;

/// Replacement for an unpaired surrogate.
const REPLACEMENT: &[u8] = br"\ufffd";

/// A reader that corrects its input byte by byte. It never reads further ahead than necessary, so
/// the count matches the bytes that were returned.
pub(crate) struct Lenient<R> {
    inner: R,
    /// Bytes to be returned next.
    ready: Vec<u8>,
    given: usize,
    in_text: bool,
    /// Number of unpaired surrogates replaced so far.
    mended: Rc<Cell<usize>>,
}

impl<R: BufRead> Lenient<R> {
    pub(crate) fn new(inner: R, mended: Rc<Cell<usize>>) -> Self {
        Lenient {
            inner,
            ready: Vec::new(),
            given: 0,
            in_text: false,
            mended,
        }
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        loop {
            match self.inner.fill_buf() {
                Ok(bytes) => return Ok(bytes.first().copied()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn next(&mut self) -> io::Result<Option<u8>> {
        let byte = self.peek()?;
        if byte.is_some() {
            self.inner.consume(1);
        }
        Ok(byte)
    }

    /// Prepares the next bytes, or none at the end.
    fn step(&mut self) -> io::Result<()> {
        let Some(byte) = self.next()? else {
            return Ok(());
        };
        match byte {
            b'"' => self.in_text = !self.in_text,
            b'\\' if self.in_text => return self.escape(),
            b'N' | b'I' | b'-' | b'0'..=b'9' if !self.in_text => return self.number(byte),
            _ => {}
        }
        self.ready.push(byte);
        Ok(())
    }

    /// Handles an escape in a string, and its second half if it is a surrogate.
    fn escape(&mut self) -> io::Result<()> {
        let mut high: Option<Vec<u8>> = None;
        loop {
            let escape = self.read_escape()?;
            let half = SurrogateHalf::of(&escape);
            if let Some(high) = high.take() {
                if half == Some(SurrogateHalf::Low) {
                    self.ready.extend(high);
                    self.ready.extend(escape);
                    return Ok(());
                }
                self.replace();
            }
            match half {
                Some(SurrogateHalf::High) if self.peek()? == Some(b'\\') => {
                    self.inner.consume(1);
                    high = Some(escape);
                    continue;
                }
                Some(_) => self.replace(),
                None => self.ready.extend(escape),
            }
            return Ok(());
        }
    }

    /// Reads the rest of an escape whose backslash has been read.
    fn read_escape(&mut self) -> io::Result<Vec<u8>> {
        let mut escape = vec![b'\\'];
        let Some(kind) = self.next()? else {
            return Ok(escape);
        };
        escape.push(kind);
        while kind == b'u' && escape.len() < 6 {
            match self.peek()? {
                Some(digit) if digit.is_ascii_hexdigit() => escape.push(digit),
                _ => break,
            }
            self.inner.consume(1);
        }
        Ok(escape)
    }

    fn replace(&mut self) {
        self.mended.set(self.mended.get() + 1);
        self.ready.extend_from_slice(REPLACEMENT);
    }

    /// Reads a number, or Python's word for one.
    fn number(&mut self, first: u8) -> io::Result<()> {
        let mut word = vec![first];
        while word.len() < LONGEST_NUMBER {
            match self.peek()? {
                Some(byte) if byte.is_ascii_alphanumeric() || b"+-.".contains(&byte) => {
                    self.inner.consume(1);
                    word.push(byte);
                }
                _ => break,
            }
        }
        match is_null(&word) {
            true => self.ready.extend_from_slice(b"null"),
            false => self.ready.extend(word),
        }
        Ok(())
    }
}

/// Returns true for numbers that JSON does not have.
fn is_null(word: &[u8]) -> bool {
    if [b"NaN" as &[u8], b"Infinity", b"-Infinity"].contains(&word) {
        return true;
    }
    let is_decimal = word
        .iter()
        .all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(byte));
    let number = std::str::from_utf8(word)
        .ok()
        .filter(|_| is_decimal && word.len() < LONGEST_NUMBER);
    number
        .and_then(|word| word.parse::<f64>().ok())
        .is_some_and(f64::is_infinite)
}

impl<R: BufRead> Read for Lenient<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.given == self.ready.len() {
            self.ready.clear();
            self.given = 0;
            self.step()?;
        }
        let left = self.ready.get(self.given..).unwrap_or_default();
        let n = left.len().min(buffer.len());
        for (to, from) in buffer.iter_mut().zip(left) {
            *to = *from;
        }
        self.given += n;
        Ok(n)
    }
}

/// Half of a surrogate pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SurrogateHalf {
    High,
    Low,
}

impl SurrogateHalf {
    /// Returns the half for an escape such as `\ud83d`; `None` for any other.
    fn of(escape: &[u8]) -> Option<SurrogateHalf> {
        let digits = escape
            .strip_prefix(br"\u")
            .filter(|digits| digits.len() == 4)?;
        let unit = u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
        match unit {
            0xd800..=0xdbff => Some(SurrogateHalf::High),
            0xdc00..=0xdfff => Some(SurrogateHalf::Low),
            _ => None,
        }
    }
}

/// Corrects a complete text; returns it and the number of replaced surrogates.
pub(crate) fn mend(text: &[u8]) -> (Vec<u8>, usize) {
    let mended = Rc::new(Cell::new(0));
    let mut lenient = Lenient::new(text, mended.clone());
    let mut out = Vec::with_capacity(text.len());
    // Reading from memory cannot fail.
    let _ = lenient.read_to_end(&mut out);
    (out, mended.get())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Returns the value and the number of replaced surrogates.
    fn read(text: &str) -> (Value, usize) {
        let (mended, count) = mend(text.as_bytes());
        let value = serde_json::from_slice(&mended).unwrap_or_else(|e| panic!("{text}: {e}"));
        (value, count)
    }

    #[test]
    fn what_python_writes_beyond_json_is_null() {
        let text = r#"{"a": NaN, "b": [Infinity,-Infinity, 1e400,-1E+999], "c": "NaN -Infinity 1e400", "d": 1e30}"#;
        let expected = json!({
            "a": null, "b": [null, null, null, null], "c": "NaN -Infinity 1e400", "d": 1e30,
        });
        assert_eq!(read(text), (expected, 0));
        assert_eq!(read("NaN").0, Value::Null);
        // Python reads it as an integer; a float is the closest value here.
        assert!(read("123456789012345678901234567890").0.is_f64());
        assert_eq!(read("-0.5e-400").0.as_f64(), Some(-0.0));
    }

    #[test]
    fn halves_of_surrogate_pairs_are_replaced_and_counted_and_pairs_are_kept() {
        for (text, expected, count) in [
            (r#""cut \\ud83d""#, "cut \\ud83d", 0),
            (r#""cut \ud83d""#, "cut \u{fffd}", 1),
            (r#""\uDE00 cut""#, "\u{fffd} cut", 1),
            (r#""\ud83d\ude00""#, "😀", 0),
            (r#""\ud83d\ud83d\ude00""#, "\u{fffd}😀", 1),
            (r#""\ud83d\n\"\ude00\u00e9""#, "\u{fffd}\n\"\u{fffd}é", 2),
            (r#""\ud83d\\""#, "\u{fffd}\\", 1),
        ] {
            assert_eq!(read(text), (Value::from(expected), count), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_stays_wrong_and_what_is_right_passes_as_it_is() {
        for text in [
            "NaNs",
            "-Inf",
            "1e",
            "{\"a\": \\u0041}",
            "\"\\ud8\"",
            "\"\\u12",
            "nan",
            "\"\\",
        ] {
            let (mended, _) = mend(text.as_bytes());
            assert!(serde_json::from_slice::<Value>(&mended).is_err(), "{text}");
        }
        let text = r#"[1, -2.5e-7, "a\tb\/c", true, null, {"N": "I", "": [[], {}]}, 18446744073709551615]"#;
        assert_eq!(mend(text.as_bytes()).0, text.as_bytes());
    }

    #[test]
    fn nothing_is_counted_before_it_is_handed_on() {
        let mended = Rc::new(Cell::new(0));
        let text = br#"{"a": "b"}{"a": "\ud83d"}"#;
        let mut lenient = Lenient::new(&text[..], mended.clone());
        let mut first = [0; 10];
        lenient.read_exact(&mut first).unwrap();
        assert_eq!((&first, mended.get()), (br#"{"a": "b"}"#, 0));
        let mut rest = Vec::new();
        lenient.read_to_end(&mut rest).unwrap();
        assert_eq!((&rest[..], mended.get()), (&br#"{"a": "\ufffd"}"#[..], 1));
    }
}
