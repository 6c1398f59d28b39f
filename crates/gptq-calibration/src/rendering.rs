//! A row as one document: a template over its columns, a conversation, or token ids.

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::chat::{ChatTemplate, Message};
use crate::reader::Row;
use crate::{CalibrationError, Template};

/// How a row becomes a document.
#[derive(Clone, Debug, PartialEq)]
pub enum Rendering {
    /// Columns filled into a text; the tokenizer adds its special tokens and the end token.
    Template(Template),
    /// A column of `{role, content}` objects, written with a chat template.
    Messages {
        /// The column.
        column: String,
        /// ChatML instead of the tokenizer's own template.
        chatml: bool,
    },
    /// A column of token ids, taken as they are: nothing is added.
    Tokens {
        /// The column.
        column: String,
    },
}

/// A row as what the tokenizer takes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Document {
    /// Gets the tokenizer's special tokens, and the end token.
    Text(String),
    /// Has every special token already.
    Complete(String),
    Tokens(Vec<u32>),
}

impl Rendering {
    /// The columns it needs.
    pub(crate) fn columns(&self) -> Vec<&str> {
        match self {
            Rendering::Template(template) => template.columns(),
            Rendering::Messages { column, .. } | Rendering::Tokens { column } => vec![column],
        }
    }

    /// As a manifest says it.
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

    /// Renders row number `index`. `chat` is there for [`Rendering::Messages`].
    pub(crate) fn render(
        &self,
        index: usize,
        row: &Row,
        chat: Option<&ChatTemplate>,
    ) -> Result<Document, CalibrationError> {
        let wrong = |column: &str, wanted| CalibrationError::Cell {
            row: index,
            column: column.to_owned(),
            wanted,
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
            (Rendering::Template(template), _) => template.render(index, row).map(Document::Text),
            (Rendering::Tokens { column }, _) => {
                let ids = cell(column)?.as_array().and_then(|ids| {
                    let id = |id: &Value| u32::try_from(id.as_u64()?).ok();
                    ids.iter().map(id).collect::<Option<Vec<u32>>>()
                });
                let ids = ids.ok_or_else(|| wrong(column, "a list of token ids"))?;
                Ok(Document::Tokens(ids))
            }
            (Rendering::Messages { column, .. }, Some(chat)) => {
                let messages = serde_json::from_value::<Vec<Message>>(cell(column)?.clone());
                let messages = messages
                    .map_err(|_| wrong(column, "a list of messages with role and content"))?;
                let text = chat.render(&messages, false)?;
                Ok(match chat.is_complete() {
                    true => Document::Complete(text),
                    false => Document::Text(text),
                })
            }
            (Rendering::Messages { .. }, None) => Err(CalibrationError::NoChatTemplate),
        }
    }
}

impl Document {
    /// Bytes it takes up.
    pub(crate) fn size(&self) -> usize {
        match self {
            Document::Text(text) | Document::Complete(text) => text.len(),
            Document::Tokens(ids) => 4 * ids.len(),
        }
    }

    /// Equal documents have equal digests.
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
    use serde_json::json;

    use super::*;

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
            tokens.render(0, row, None).unwrap(),
            Document::Tokens(vec![1, 5, 2])
        );
        let messages = Rendering::Messages {
            column: "messages".into(),
            chatml: true,
        };
        let chat = ChatTemplate::chatml();
        assert_eq!(
            messages.render(0, row, Some(&chat)).unwrap(),
            Document::Text("<|im_start|>user\nHi<|im_end|>\n".into())
        );
        let wrong = |rendering: Rendering| {
            rendering
                .render(3, row, Some(&chat))
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
}
