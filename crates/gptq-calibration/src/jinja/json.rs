//! The filter `tojson`: Python's `json.dumps`, by which Transformers replaces Jinja's own.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, State, Value};

use super::python::{Text, float, float_text, is_dict, refusal, type_name};

/// Style of the JSON output.
struct Style {
    ascii: bool,
    /// One step of indentation; `None` writes a single line.
    indent: Option<String>,
    item: String,
    key: String,
    sorted: bool,
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub(super) fn tojson(
    state: &State<'_, '_>,
    value: &Value,
    positional: Rest<Value>,
    keywords: Kwargs,
) -> Result<Value, Error> {
    if positional.len() > 4 {
        return Err(refusal("tojson takes at most 4 arguments"));
    }
    let argument = |i: usize, name: &str| match (positional.get(i), keywords.has(name)) {
        (Some(_), true) => Err(refusal(format!("tojson got two values for {name}"))),
        (Some(value), false) => Ok(Some(value.clone())),
        (None, _) => keywords.get::<Option<Value>>(name),
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let indent = match argument(1, "indent")?.filter(|indent| !indent.is_none()) {
        None => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => {
                let spaces =
                    i64::try_from(indent).map_err(|_| refusal("tojson: indent is not a number"))?;
                " ".repeat(usize::try_from(spaces.clamp(0, 1 << 10)).unwrap_or(0))
            }
        }),
    };
    let (item, key) = match argument(2, "separators")?.filter(|pair| !pair.is_none()) {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some(pair) => {
            let pair: Vec<Value> = pair.try_iter()?.collect();
            match pair.as_slice() {
                [item, key] => match (item.as_str(), key.as_str()) {
                    (Some(item), Some(key)) => (item.to_owned(), key.to_owned()),
                    _ => return Err(refusal("tojson: separators must be two texts")),
                },
                _ => return Err(refusal("tojson: separators must be two texts")),
            }
        }
    };
    let style = Style {
        ascii: is_true(argument(0, "ensure_ascii")?),
        indent,
        item,
        key,
        sorted: is_true(argument(3, "sort_keys")?),
    };
    keywords.assert_all_used()?;
    let mut text = Text::new(state);
    style.write(value, 0, &mut text)?;
    Ok(text.finish().into())
}

impl Style {
    fn write(&self, value: &Value, depth: usize, text: &mut Text<'_, '_, '_>) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => text.push("null"),
            ValueKind::Bool => text.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => text.push(&number(value)),
            ValueKind::String => self.quote(value.as_str().unwrap_or_default(), text),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.collect::<Vec<Value>>();
                text.push("[")?;
                for (i, item) in items.iter().enumerate() {
                    self.separate(i, depth + 1, text)?;
                    self.write(item, depth + 1, text)?;
                }
                self.close(items.is_empty(), depth, "]", text)
            }
            ValueKind::Map if is_dict(value) => {
                let mut keys = value.try_iter()?.collect::<Vec<Value>>();
                if self.sorted {
                    keys.sort();
                }
                text.push("{")?;
                for (i, key) in keys.iter().enumerate() {
                    self.separate(i, depth + 1, text)?;
                    let name = match key.kind() {
                        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                        ValueKind::None => "null".into(),
                        ValueKind::Bool if key.is_true() => "true".into(),
                        ValueKind::Bool => "false".into(),
                        ValueKind::Number => number(key),
                        _ => {
                            let kind = type_name(key);
                            return Err(refusal(format!("tojson: a key of type {kind}")));
                        }
                    };
                    self.quote(&name, text)?;
                    text.push(&self.key)?;
                    self.write(&value.get_item(key)?, depth + 1, text)?;
                }
                self.close(keys.is_empty(), depth, "}", text)
            }
            _ => {
                let kind = type_name(value);
                Err(refusal(format!(
                    "Object of type {kind} is not JSON serializable"
                )))
            }
        }
    }

    /// Writes the separator before item `i`.
    fn separate(&self, i: usize, depth: usize, text: &mut Text<'_, '_, '_>) -> Result<(), Error> {
        if i > 0 {
            text.push(&self.item)?;
        }
        self.break_line(depth, text)
    }

    fn close(
        &self,
        is_empty: bool,
        depth: usize,
        bracket: &str,
        text: &mut Text<'_, '_, '_>,
    ) -> Result<(), Error> {
        if !is_empty {
            self.break_line(depth, text)?;
        }
        text.push(bracket)
    }

    fn break_line(&self, depth: usize, text: &mut Text<'_, '_, '_>) -> Result<(), Error> {
        let Some(indent) = &self.indent else {
            return Ok(());
        };
        text.push("\n")?;
        (0..depth).try_for_each(|_| text.push(indent))
    }

    fn quote(&self, string: &str, text: &mut Text<'_, '_, '_>) -> Result<(), Error> {
        text.push("\"")?;
        let mut buffer = [0; 4];
        for c in string.chars() {
            match c {
                '"' => text.push("\\\"")?,
                '\\' => text.push("\\\\")?,
                '\n' => text.push("\\n")?,
                '\r' => text.push("\\r")?,
                '\t' => text.push("\\t")?,
                '\u{8}' => text.push("\\b")?,
                '\u{c}' => text.push("\\f")?,
                c if c < ' ' || (self.ascii && !matches!(c, ' '..='~')) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        text.push(&format!("\\u{unit:04x}"))?;
                    }
                }
                c => text.push(c.encode_utf8(&mut buffer))?,
            }
        }
        text.push("\"")
    }
}

fn number(value: &Value) -> String {
    match float(value) {
        Some(number) => float_text(number, "Infinity", "NaN"),
        None => value.to_string(),
    }
}
