//! A JSON object read key by key, so that whatever is wrong with a value is said with its key.
//!
//! A number that is not finite stands there as Transformers 5 writes it, `{"__float__": "NaN"}`
//! ([`gptq_format::read_json`] makes that of Python's bare `NaN`): nobody minds it where the key is
//! not read.

use serde_json::{Map, Value};

/// Most characters of a value that a message shows.
const SHOWN: usize = 40;

/// An object, and what its keys are called in messages.
pub(crate) struct Keys<'a> {
    object: &'a Map<String, Value>,
    /// `"rope_scaling."` of an object inside.
    prefix: String,
}

/// A type that a key may have.
pub(crate) trait Typed: Sized {
    /// With its article.
    const NAME: &'static str;

    fn typed(value: &Value) -> Option<Self>;
}

impl<'a> Keys<'a> {
    /// Of the whole file.
    pub(crate) fn new(object: &'a Map<String, Value>) -> Self {
        Keys {
            object,
            prefix: String::new(),
        }
    }

    /// The value as it stands; `null` is one.
    pub(crate) fn value(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key)
    }

    /// What a message calls the key.
    pub(crate) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// A key that must be there.
    pub(crate) fn required<T: Typed>(&self, key: &str) -> Result<T, String> {
        let missing = || format!("{} is missing", self.name(key));
        self.found(key)?.ok_or_else(missing)
    }

    /// A key that may be left out, and may not be `null`.
    pub(crate) fn found<T: Typed>(&self, key: &str) -> Result<Option<T>, String> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        let wrong = || format!("{}: {} is not {}", self.name(key), shown(value), T::NAME);
        T::typed(value).map(Some).ok_or_else(wrong)
    }

    /// A key that may be left out, and whose `null` (`Some(None)`) says something else than that.
    pub(crate) fn nullable<T: Typed>(&self, key: &str) -> Result<Option<Option<T>>, String> {
        match self.value(key) {
            Some(Value::Null) => Ok(Some(None)),
            _ => Ok(self.found(key)?.map(Some)),
        }
    }

    /// An object inside; `None` where it is left out or holds nothing, as Python's `or` sees it.
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

    /// Every key with its value.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.object.iter()
    }
}

/// A value as a message shows it.
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

impl Typed for Vec<String> {
    const NAME: &'static str = "a list of texts";

    fn typed(value: &Value) -> Option<Vec<String>> {
        value.as_array()?.iter().map(String::typed).collect()
    }
}
