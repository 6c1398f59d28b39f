//! Prompt templates: the text round what a user says, for the card.

use std::fs;
use std::path::Path;

use crate::ReportError;

/// Known names and their text; `{prompt}` is the user's part, `{system_message}` an instruction.
const KNOWN: [(&str, &str); 4] = [
    (
        "chatml",
        "<|im_start|>system\n{system_message}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n\
         <|im_start|>assistant\n",
    ),
    (
        "llama-2",
        "[INST] <<SYS>>\n{system_message}\n<</SYS>>\n\n{prompt} [/INST]",
    ),
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
}

impl PromptTemplate {
    /// A known name, or a file with the text.
    ///
    /// # Errors
    /// Neither, or a file without `{prompt}`.
    pub fn load(name: &str) -> Result<Self, ReportError> {
        if let Some((_, text)) = KNOWN.iter().find(|(known, _)| *known == name) {
            return Ok(PromptTemplate {
                name: name.to_owned(),
                text: (*text).to_owned(),
            });
        }
        let path = Path::new(name);
        match fs::read_to_string(path) {
            Ok(text) if text.contains("{prompt}") => Ok(PromptTemplate {
                name: path
                    .file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into(),
                text,
            }),
            _ => Err(ReportError::PromptTemplate {
                name: name.to_owned(),
                known: KNOWN.map(|(known, _)| known).join(", "),
            }),
        }
    }
}
