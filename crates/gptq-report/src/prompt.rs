//! Prompt templates: the text round what a user says, for the card.

use std::fs;
use std::path::Path;

use gptq_calibration::{ChatTemplate, Message};

use crate::ReportError;

/// The name of what the tokenizer has.
const OWN: &str = "own";
/// Where the user's text goes.
const PROMPT: &str = "{prompt}";

/// Known names and their text; `{prompt}` is the user's part.
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

/// How a model is to be prompted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptTemplate {
    /// Its name, or that of its file.
    pub name: String,
    /// Text with `{prompt}` and perhaps `{system_message}`.
    pub text: String,
    /// Whether it is the tokenizer's chat template, which programs apply by themselves.
    pub own: bool,
}

impl PromptTemplate {
    /// The chat template of the tokenizer in `dir`, where it has one, else `plain`.
    ///
    /// # Errors
    /// A template that does not parse.
    pub fn of(dir: &Path) -> Result<Self, ReportError> {
        match PromptTemplate::own(dir)? {
            Some(own) => Ok(own),
            None => PromptTemplate::load("plain", dir),
        }
    }

    /// The chat template of the tokenizer in `dir`, shown on a first message of the user.
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

    /// A known name, `own` for the chat template of the tokenizer in `dir`, or a file with the text.
    ///
    /// # Errors
    /// None of these, or a file without `{prompt}`.
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
