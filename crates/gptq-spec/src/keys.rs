//! Reads a JSON object key by key, so that errors name the key.
//!
//! A number that is not finite is written as in Transformers 5, `{"__float__": "NaN"}`
//! ([`gptq_format::read_json`] converts Python's bare `NaN`); it is harmless in a key that is not
//! read.

use serde_json::{Map, Value};

/// Maximum number of characters of a value in a message.
const SHOWN: usize = 40;

/// An object, with the prefix of its keys in messages.
pub(crate) struct Keys<'a> {
    object: &'a Map<String, Value>,
    /// Prefix of a nested object, such as `"rope_scaling."`.
    prefix: String,
}

/// Type of a key's value.
pub(crate) trait Typed: Sized {
    /// Name with its article.
    const NAME: &'static str;

    fn typed(value: &Value) -> Option<Self>;
}

impl<'a> Keys<'a> {
    /// Wraps the top-level object.
    pub(crate) fn new(object: &'a Map<String, Value>) -> Self {
        Keys {
            object,
            prefix: String::new(),
        }
    }

    /// Returns the value, which may be `null`.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key)
    }

    /// Returns the key's name for messages.
    pub(crate) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Reads a required key.
    pub(crate) fn required<T: Typed>(&self, key: &str) -> Result<T, String> {
        let missing = || format!("{} is missing", self.name(key));
        self.found(key)?.ok_or_else(missing)
    }

    /// Reads an optional key that may not be `null`.
    pub(crate) fn found<T: Typed>(&self, key: &str) -> Result<Option<T>, String> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let wrong = || format!("{}: {} is not {}", self.name(key), shown(value), T::NAME);
        T::typed(value).map(Some).ok_or_else(wrong)
    }

    /// Reads an optional key whose `null` (`Some(None)`) differs from a missing key.
    pub(crate) fn nullable<T: Typed>(&self, key: &str) -> Result<Option<Option<T>>, String> {
        match self.value(key) {
            Some(Value::Null) => Ok(Some(None)),
            _ => Ok(self.found(key)?.map(Some)),
        }
    }

    /// Returns a nested object; `None` if it is missing or empty, as with Python's `or`.
    pub(crate) fn inside(&self, key: &str) -> Result<Option<Keys<'a>>, String> {
        match self.value(key) {
            None | Some(Value::Null | Value::Bool(false)) => Ok(None),
            Some(Value::Object(object)) if object.is_empty() => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Keys {
                object,
                prefix: format!("{}{key}.", self.prefix),
            })),
            Some(value) => Err(format!(
                "{}: {} is not an object",
                self.name(key),
                shown(value)
            )),
        }
    }

    /// Iterates over keys and values.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.object.iter()
    }
}

/// Formats a value for a message.
fn shown(value: &Value) -> String {
    let float = value.get("__float__").and_then(Value::as_str);
    let text = float.map_or_else(|| value.to_string(), str::to_owned);
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

impl Typed for usize {
    const NAME: &'static str = "a whole number";

    fn typed(value: &Value) -> Option<usize> {
        usize::try_from(value.as_u64()?).ok()
    }
}

impl Typed for f64 {
    const NAME: &'static str = "a number";

    fn typed(value: &Value) -> Option<f64> {
        value.as_f64()
    }
}

impl Typed for bool {
    const NAME: &'static str = "true or false";

    fn typed(value: &Value) -> Option<bool> {
        value.as_bool()
    }
}

impl Typed for String {
    const NAME: &'static str = "a text";

    fn typed(value: &Value) -> Option<String> {
        value.as_str().map(str::to_owned)
    }
}

impl Typed for Vec<usize> {
    const NAME: &'static str = "a list of whole numbers";

    fn typed(value: &Value) -> Option<Vec<usize>> {
        value.as_array()?.iter().map(usize::typed).collect()
    }
}

impl Typed for Vec<f64> {
    const NAME: &'static str = "a list of numbers";

    fn typed(value: &Value) -> Option<Vec<f64>> {
        value.as_array()?.iter().map(f64::typed).collect()
    }
}

impl Typed for Vec<String> {
    const NAME: &'static str = "a list of texts";

    fn typed(value: &Value) -> Option<Vec<String>> {
        value.as_array()?.iter().map(String::typed).collect()
    }
}

/// A number that has to be over zero.
pub(crate) fn positive(keys: &Keys<'_>, key: &str) -> Result<Option<f64>, String> {
    let wrong = |value: f64| format!("{} = {value} is not positive", keys.name(key));
    match keys.found::<f64>(key)? {
        Some(value) if value > 0.0 => Ok(Some(value)),
        Some(value) => Err(wrong(value)),
        None => Ok(None),
    }
}

/// A switch of the config, off where it is left out.
pub(crate) fn flag(config: &Keys<'_>, key: &str) -> Result<bool, String> {
    Ok(config.found(key)?.unwrap_or(false))
}

/// Refuses a switch that is on.
pub(crate) fn off(config: &Keys<'_>, key: &str) -> Result<(), String> {
    match config.nullable(key)?.flatten() {
        Some(true) => Err(format!("{} = true is not supported", config.name(key))),
        _ => Ok(()),
    }
}

/// A factor, `default` where it is left out.
pub(crate) fn number(config: &Keys<'_>, key: &str, default: f64) -> Result<f64, String> {
    Ok(positive(config, key)?.unwrap_or(default))
}

/// A factor that may be `null`, `default` where it is left out.
pub(crate) fn or_none(
    config: &Keys<'_>,
    key: &str,
    default: Option<f64>,
) -> Result<Option<f64>, String> {
    match config.value(key) {
        None => Ok(default),
        Some(Value::Null) => Ok(None),
        Some(_) => positive(config, key),
    }
}
