//! Reads JSON as Python writes it: with `NaN`, `Infinity` and `-Infinity`, which JSON does not
//! have, and numbers beyond an f64 as infinity.
//!
//! Such a number becomes an object, as in Transformers 5: `{"__float__": "Infinity"}`. Reading that
//! key as a number fails with a message; other keys are unaffected, and Transformers reads the
//! original number back.

/// Returns the text with every number that is not finite replaced by such an object; `None` if
/// there is none.
pub(crate) fn tagged(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let (mut copied, mut at) = (0, 0);
    while let Some(&byte) = text.get(at) {
        let start = at;
        if byte == b'"' {
            at = after_string(text, at);
            continue;
        }
        let word = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-.".contains(byte);
        at += text.iter().skip(at).take_while(|byte| word(byte)).count();
        if at == start {
            at += 1;
            continue;
        }
        if let Some(float) = text.get(start..at).and_then(not_finite) {
            out.extend_from_slice(text.get(copied..start).unwrap_or_default());
            out.extend_from_slice(format!("{{\"__float__\": \"{float}\"}}").as_bytes());
            copied = at;
        }
    }
    if copied == 0 {
        return None;
    }
    out.extend_from_slice(text.get(copied..).unwrap_or_default());
    Some(out)
}

/// Returns the end of the string that begins at `at`.
fn after_string(text: &[u8], at: usize) -> usize {
    let mut escaped = false;
    let inside = text.iter().skip(at + 1).take_while(|&&byte| {
        let more = escaped || byte != b'"';
        escaped = !escaped && byte == b'\\';
        more
    });
    at + 1 + inside.count() + 1
}

/// Returns Python's name for a non-finite number outside of strings.
fn not_finite(word: &[u8]) -> Option<&'static str> {
    let infinite = |name| match name {
        true => "-Infinity",
        false => "Infinity",
    };
    match word {
        b"NaN" => Some("NaN"),
        b"Infinity" | b"-Infinity" => Some(infinite(word.first() == Some(&b'-'))),
        _ => {
            let text = std::str::from_utf8(word).ok()?;
            let digits = text.strip_prefix('-').unwrap_or(text);
            let number = digits.starts_with(|c: char| c.is_ascii_digit());
            let value: f64 = text.parse().ok().filter(|_| number)?;
            value.is_infinite().then(|| infinite(value < 0.0))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn numbers_that_are_not_finite_are_what_transformers_writes_for_them() {
        let text = r#"{"a": NaN, "b":[Infinity,-Infinity , 1e400,-1e400, -1.5e3], "NaN": "Infinity, \" NaN",
                       "c": {"d":NaN}, "e": "x\\", "f": Infinity}"#;
        let read: Value = serde_json::from_slice(&tagged(text.as_bytes()).unwrap()).unwrap();
        let float = |name: &str| json!({"__float__": name});
        let (nan, up, down) = (float("NaN"), float("Infinity"), float("-Infinity"));
        let expected = json!({"a": nan, "b": [up, down, up, down, -1500.0], "NaN": "Infinity, \" NaN",
                              "c": {"d": nan}, "e": "x\\", "f": up});
        assert_eq!(read, expected);
        for sound in [
            r#"{"a": 1e308, "b": "NaN"}"#,
            "",
            "\"",
            "\"\\",
            "inf nan -inf 1 -",
        ] {
            assert_eq!(tagged(sound.as_bytes()), None, "{sound}");
        }
    }
}
