//! Prompt templates: the text around the user's message, for the card.

use std::fs;
use std::path::Path;

use gptq_calibration::{ChatTemplate, Message};

use crate::ReportError;

/// Name of the tokenizer's own template.
const OWN: &str = "own";
/// Placeholder of the user's text.
const PROMPT: &str = "{prompt}";

/// Built-in templates by name; `{prompt}` is the user's text.
const KNOWN: [(&str, &str); 4] = [
    (
        "chatml",
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    ),
    ("llama-2", "[INST] {prompt} [/INST]"),
    (
        "alpaca",
        "Below is an instruction that describes a task. Write a response that appropriately \
         completes the request.\n\n### Instruction:\n{prompt}\n\n### Response:\n",
    ),
    ("plain", "{prompt}"),
];

/// A prompt template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptTemplate {
    /// Its name or file name.
    pub name: String,
    /// Text with `{prompt}` and optionally `{system_message}`.
    pub text: String,
    /// True for the tokenizer's chat template, which clients apply by themselves.
    pub own: bool,
}

impl PromptTemplate {
    /// Returns the chat template of the tokenizer in `dir`, or `plain` if it has none.
    ///
    /// # Errors
    /// A template that does not parse.
    pub fn of(dir: &Path) -> Result<Self, ReportError> {
        match PromptTemplate::own(dir)? {
            Some(own) => Ok(own),
            None => PromptTemplate::load("plain", dir),
        }
    }

    /// Returns the chat template of the tokenizer in `dir`, rendered for a single user message.
    fn own(dir: &Path) -> Result<Option<Self>, ReportError> {
        let failed = |source| ReportError::ChatTemplate {
            dir: dir.into(),
            source: Box::new(source),
        };
        let Some(template) = ChatTemplate::of(dir).map_err(failed)? else {
            return Ok(None);
        };
        let shown = template.render(&[Message::new("user", PROMPT)], true);
        Ok(Some(PromptTemplate {
            name: OWN.to_owned(),
            text: shown.map_err(failed)?,
            own: true,
        }))
    }

    /// Loads a built-in template, `own` for the chat template of the tokenizer in `dir`, or a file.
    ///
    /// # Errors
    /// A name that is none of these, or a file without `{prompt}`.
    pub fn load(name: &str, dir: &Path) -> Result<Self, ReportError> {
        if name == OWN {
            let none = || ReportError::NoChatTemplate { dir: dir.into() };
            return PromptTemplate::own(dir)?.ok_or_else(none);
        }
        if let Some((_, text)) = KNOWN.iter().find(|(known, _)| *known == name) {
            return Ok(PromptTemplate {
                name: name.to_owned(),
                text: (*text).to_owned(),
                own: false,
            });
        }
        let path = Path::new(name);
        match fs::read_to_string(path) {
            Ok(text) if text.contains(PROMPT) => Ok(PromptTemplate {
                name: path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into(),
                text,
                own: false,
            }),
            _ => Err(ReportError::PromptTemplate {
                name: name.to_owned(),
                known: format!("{OWN}, {}", KNOWN.map(|(known, _)| known).join(", ")),
            }),
        }
    }
}
