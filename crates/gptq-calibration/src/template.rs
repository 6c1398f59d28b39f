//! `"{input}\n{output}"`: inserts a row's columns into a text.

use crate::CalibrationError;
use crate::json::kind;
use crate::value::{Map, Value};

/// A parsed template: literal text and column names in braces; `{{` and `}}` are literal braces.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    text: String,
    parts: Vec<TemplatePart>,
}

#[derive(Clone, Debug, PartialEq)]
enum TemplatePart {
    Literal(String),
    Column(String),
}

impl Template {
    /// Parses a template. Errors on an unmatched brace and on a template without any column.
    pub fn parse(text: &str) -> Result<Self, CalibrationError> {
        let error = |reason: &str| CalibrationError::Template {
            template: text.into(),
            reason: reason.into(),
        };
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '{' | '}' if chars.peek() == Some(&c) => {
                    chars.next();
                    literal.push(c);
                }
                '{' => {
                    let mut column = String::new();
                    loop {
                        match chars.next() {
                            Some('}') => break,
                            Some('{') | None => return Err(error("a { is not closed")),
                            Some(c) => column.push(c),
                        }
                    }
                    if column.is_empty() {
                        return Err(error("{} names no column"));
                    }
                    if !literal.is_empty() {
                        parts.push(TemplatePart::Literal(std::mem::take(&mut literal)));
                    }
                    parts.push(TemplatePart::Column(column));
                }
                '}' => return Err(error("a } has no {")),
                c => literal.push(c),
            }
        }
        if !literal.is_empty() {
            parts.push(TemplatePart::Literal(literal));
        }
        if !parts.iter().any(|p| matches!(p, TemplatePart::Column(_))) {
            return Err(error("it names no column, so every row would be the same"));
        }
        Ok(Template {
            text: text.into(),
            parts,
        })
    }

    /// Makes a template of a single column.
    pub fn column(name: &str) -> Self {
        Template {
            text: format!("{{{}}}", name.replace('{', "{{").replace('}', "}}")),
            parts: vec![TemplatePart::Column(name.to_owned())],
        }
    }

    /// Returns the columns it names.
    pub(crate) fn columns(&self) -> Vec<&str> {
        let columns = self.parts.iter().filter_map(|part| match part {
            TemplatePart::Column(column) => Some(column.as_str()),
            TemplatePart::Literal(_) => None,
        });
        columns.collect()
    }

    /// Returns the template as typed.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Inserts the columns of row number `index`: strings as they are, numbers and booleans as in
    /// JSON. Errors if a column is missing, null, a list or an object.
    pub fn render(&self, index: usize, row: &Map) -> Result<String, CalibrationError> {
        let mut document = String::new();
        for part in &self.parts {
            let column = match part {
                TemplatePart::Literal(text) => {
                    document += text;
                    continue;
                }
                TemplatePart::Column(column) => column,
            };
            match row.get(column) {
                Some(Value::String(text)) => document += text,
                Some(plain @ (Value::Number(_) | Value::Bool(_))) => document += &plain.to_string(),
                Some(other) => {
                    return Err(CalibrationError::Cell {
                        row: index,
                        column: column.clone(),
                        found: format!("it is {}", kind(other)),
                        takes: "a template takes texts, numbers and booleans",
                    });
                }
                None => {
                    return Err(CalibrationError::Column {
                        row: index,
                        column: column.clone(),
                        columns: row.keys().cloned().collect(),
                    });
                }
            }
        }
        Ok(document)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_and_doubled_braces_are_filled_in() {
        let template = Template::parse("{a}\n{{x}} {b}").unwrap();
        let row = Value::from(
            json!({"a": "one", "b": "two", "c": 3, "d": [], "e": null, "f": 0.5, "g": true}),
        );
        let row = row.as_object().unwrap();
        assert_eq!(template.render(0, row).unwrap(), "one\n{x} two");
        let plain = Template::parse("{c} {f} {g}").unwrap();
        assert_eq!(plain.render(0, row).unwrap(), "3 0.5 true");
        let error = |text: &str| {
            let template = Template::parse(text).unwrap();
            template.render(7, row).unwrap_err().to_string()
        };
        for (text, words) in [
            ("{h}", ["row 7", "\"h\"", "a, b, c, d, e, f, g"]),
            ("{d}", ["row 7", "\"d\"", "it is a list"]),
            ("{e}", ["row 7", "\"e\"", "it is null"]),
        ] {
            let error = error(text);
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
    }

    #[test]
    fn broken_templates_are_refused() {
        for text in ["{a", "a}", "{}", "plain", "{a{b}}", ""] {
            assert!(Template::parse(text).is_err(), "{text}");
        }
    }
}
