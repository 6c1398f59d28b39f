//! Conversion of a row to a document: a template over its columns, a conversation, or token ids.

use sha2::{Digest, Sha256};

use crate::chat::ChatTemplate;
use crate::conversation;
use crate::row::Row;
use crate::token_rows::{self, MASK, TokenRules};
use crate::value::Value;
use crate::{CalibrationError, Template};

/// Column of a conversation's tools, beside its messages.
const TOOLS: &str = "tools";

/// Conversion of a row to a document.
#[derive(Clone, Debug, PartialEq)]
pub enum Rendering {
    /// Columns inserted into a text; the tokenizer adds its special tokens and the end token.
    Template(Template),
    /// A column of `{role, content}` or `{from, value}` objects, written with a chat template.
    Messages {
        /// The column.
        column: String,
        /// ChatML instead of the tokenizer's own template.
        chatml: bool,
    },
    /// A column of token ids, used as they are: nothing is added. Positions that a column
    /// `attention_mask` masks, if there is one, are removed.
    Tokens {
        /// The column.
        column: String,
    },
}

/// Input of the tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Document {
    /// Gets the tokenizer's special tokens and the end token.
    Text(String),
    /// Contains every special token already.
    Complete(String),
    Tokens(Vec<u32>),
}

impl Rendering {
    /// Returns the required columns.
    pub(crate) fn columns(&self) -> Vec<&str> {
        match self {
            Rendering::Template(template) => template.columns(),
            Rendering::Messages { column, .. } | Rendering::Tokens { column } => vec![column],
        }
    }

    /// Returns columns that are read if present.
    pub(crate) fn optional_columns(&self) -> &'static [&'static str] {
        match self {
            Rendering::Tokens { .. } => &[MASK],
            Rendering::Messages { .. } => &[TOOLS],
            Rendering::Template(_) => &[],
        }
    }

    /// Returns true if a row that has all required columns holds no text.
    pub(crate) fn is_blank(&self, row: &Row) -> bool {
        let is_blank = |cell: &Value| match cell {
            Value::String(text) => text.trim().is_empty(),
            Value::Array(parts) => parts.is_empty(),
            _ => false,
        };
        let cell = |column: &str| row.get(column);
        match self {
            Rendering::Template(template) => {
                let mut cells = template.columns().into_iter().filter_map(cell);
                cells.all(is_blank)
            }
            // A tool call counts as text.
            Rendering::Messages { column, .. } => {
                let mut messages = cell(column).and_then(Value::as_array).into_iter().flatten();
                messages.all(|message| {
                    let mut said = ["content", "value"]
                        .into_iter()
                        .filter_map(|key| message.get(key));
                    message.as_object().is_some()
                        && message.get("tool_calls").is_none_or(Value::is_null)
                        && said.all(|said| said.is_null() || is_blank(said))
                        && ["role", "from"]
                            .iter()
                            .any(|key| message.get(key).is_some())
                }) && cell(column).is_some_and(|cell| cell.as_array().is_some())
            }
            Rendering::Tokens { .. } => false,
        }
    }

    /// Describes the rendering for a manifest.
    pub(crate) fn describe(&self) -> String {
        match self {
            Rendering::Template(template) => template.as_str().to_owned(),
            Rendering::Messages { column, chatml } => match chatml {
                true => format!("ChatML over {column}"),
                false => format!("the tokenizer's chat template over {column}"),
            },
            Rendering::Tokens { column } => format!("token ids in {column}"),
        }
    }

    /// Renders row number `index`, and returns the number of masked positions. `chat` is required
    /// for [`Rendering::Messages`], and `rules` for [`Rendering::Tokens`].
    pub(crate) fn render(
        &self,
        index: usize,
        row: &Row,
        chat: Option<&ChatTemplate>,
        rules: &TokenRules,
    ) -> Result<(Document, usize), CalibrationError> {
        let wrong = |column: &str, found, takes| CalibrationError::Cell {
            row: index,
            column: column.to_owned(),
            found,
            takes,
        };
        let cell = |column: &str| {
            let missing = || CalibrationError::Column {
                row: index,
                column: column.to_owned(),
                columns: row.keys().cloned().collect(),
            };
            row.get(column).ok_or_else(missing)
        };
        match (self, chat) {
            (Rendering::Template(template), _) => {
                Ok((Document::Text(template.render(index, row)?), 0))
            }
            (Rendering::Tokens { column }, _) => {
                let takes = "tokens takes lists of token ids, without padding or with an attention_mask column";
                let found = token_rows::ids(cell(column)?, row.get(MASK), rules);
                let (ids, masked) = found.map_err(|found| wrong(column, found, takes))?;
                Ok((Document::Tokens(ids), masked))
            }
            (Rendering::Messages { column, .. }, Some(chat)) => {
                let takes = "messages takes a list of {role, content} or {from, value} objects";
                let messages = conversation::messages(cell(column)?);
                let messages = messages.map_err(|found| wrong(column, found, takes))?;
                let tools = match row.get(TOOLS) {
                    Some(cell) => conversation::tools(cell).map_err(|found| {
                        wrong(TOOLS, found, "the column tools must be a list of tools")
                    })?,
                    None => Value::Null,
                };
                let text = chat.write(&messages, &tools, false);
                let text = text.map_err(CalibrationError::in_row(index))?;
                let document = match chat.is_complete() {
                    true => Document::Complete(text),
                    false => Document::Text(text),
                };
                Ok((document, 0))
            }
            (Rendering::Messages { .. }, None) => Err(CalibrationError::NoChatTemplate),
        }
    }
}

impl Document {
    /// Returns true if it has no content.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Document::Text(text) | Document::Complete(text) => text.trim().is_empty(),
            Document::Tokens(ids) => ids.is_empty(),
        }
    }

    /// Returns true if its text has U+FFFD, which replaces unpaired surrogates.
    pub(crate) fn is_mended(&self) -> bool {
        match self {
            Document::Text(text) | Document::Complete(text) => {
                text.contains(char::REPLACEMENT_CHARACTER)
            }
            Document::Tokens(_) => false,
        }
    }

    /// Returns its size in bytes.
    pub(crate) fn size(&self) -> usize {
        match self {
            Document::Text(text) | Document::Complete(text) => text.len(),
            Document::Tokens(ids) => 4 * ids.len(),
        }
    }

    /// Returns a digest; equal documents have equal digests.
    pub(crate) fn digest(&self) -> [u8; 32] {
        match self {
            Document::Text(text) | Document::Complete(text) => Sha256::digest(text).into(),
            Document::Tokens(ids) => {
                let mut hasher = Sha256::new();
                ids.iter().for_each(|id| hasher.update(id.to_le_bytes()));
                hasher.finalize().into()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    macro_rules! json {
        ($($json:tt)*) => {
            Value::from(serde_json::json!($($json)*))
        };
    }

    #[test]
    fn messages_and_token_ids_become_documents() {
        let row = json!({
            "messages": [{"role": "user", "content": "Hi"}], "input_ids": [1, 5, 2], "text": "a",
        });
        let row = row.as_object().unwrap();
        let tokens = Rendering::Tokens {
            column: "input_ids".into(),
        };
        assert_eq!(
            tokens.render(0, row, None, &TokenRules::default()).unwrap(),
            (Document::Tokens(vec![1, 5, 2]), 0)
        );
        let messages = Rendering::Messages {
            column: "messages".into(),
            chatml: true,
        };
        let chat = ChatTemplate::chatml();
        assert_eq!(
            messages
                .render(0, row, Some(&chat), &TokenRules::default())
                .unwrap()
                .0,
            Document::Text("<|im_start|>user\nHi<|im_end|>\n".into())
        );
        let wrong = |rendering: Rendering| {
            rendering
                .render(3, row, Some(&chat), &TokenRules::default())
                .unwrap_err()
                .to_string()
        };
        let column = || "text".to_owned();
        let told = wrong(Rendering::Tokens { column: column() });
        assert!(
            told.contains("row 3") && told.contains("token ids"),
            "{told}"
        );
        let told = wrong(Rendering::Messages {
            column: column(),
            chatml: true,
        });
        assert!(told.contains("row 3") && told.contains("role"), "{told}");
    }

    #[test]
    fn a_template_sees_every_key_of_a_message() {
        let dir = tempfile::tempdir().unwrap();
        let template = "{% for m in messages %}{{ m.role }}{% if m.tool_calls is defined %}\
                        {{ m.tool_calls | tojson }}{% endif %}:{{ m.content }};{% endfor %}";
        std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
        let chat = ChatTemplate::of(dir.path()).unwrap();
        let talk = json!({"talk": [
            {"from": "human", "value": "Hi", "tool_calls": null},
            {"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]},
        ]});
        let rendering = Rendering::Messages {
            column: "talk".into(),
            chatml: false,
        };
        let row = talk.as_object().unwrap();
        let document = rendering.render(0, row, chat.as_ref(), &TokenRules::default());
        let expected = "user:Hi;assistant[{\"name\": \"f\"}]:;";
        assert_eq!(document.unwrap().0, Document::Complete(expected.into()));
    }
}
