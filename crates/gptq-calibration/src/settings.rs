//! Settings of calibration data.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::chat::ChatTemplate;
use crate::{CalibrationError, Rendering, RowRange, Source, TextTokenizer, is_date};

/// Selection of windows from the joined rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sampling {
    /// Seeded windows anywhere in the joined rows; they may overlap.
    #[default]
    RandomWindows,
    /// Consecutive windows from the start.
    Concatenate,
}

/// Action for a row that its chat template refuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// Stop the run with an error that names the row.
    #[default]
    Stop,
    /// Skip the row and count it.
    Skip,
}

impl FromStr for OnError {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "stop" => Ok(OnError::Stop),
            "skip" => Ok(OnError::Skip),
            _ => Err("neither stop nor skip".into()),
        }
    }
}

/// Settings of the calibration data.
#[derive(Clone, Debug, PartialEq)]
pub struct CalibrationSettings {
    /// Source of the rows.
    pub source: Source,
    /// Conversion of a row to a document.
    pub rendering: Rendering,
    /// Range of rows, counted over all files of the source.
    pub rows: RowRange,
    /// Minimum number of tokens of a row, as encoded; shorter ones are skipped.
    pub min_tokens: usize,
    /// Keep only the first of equal documents.
    pub dedupe: bool,
    /// Action for a row that a chat template refuses.
    pub on_error: OnError,
    /// Date seen by chat templates, `2026-11-30` or `2026-11-30T08:15:00`; by default the current
    /// time.
    pub date: Option<String>,
    /// Number of windows.
    pub samples: usize,
    /// Tokens per window.
    pub seq_len: usize,
    /// Seed of the draw.
    pub seed: u64,
    /// Selection of windows.
    pub sampling: Sampling,
}

impl CalibrationSettings {
    /// Loads the chat template if rows are conversations, with the date it will use.
    ///
    /// # Errors
    /// A template that cannot be read or does not parse, a tokenizer without one, or an invalid
    /// date.
    pub(crate) fn chat(
        &self,
        tokenizer: &TextTokenizer,
    ) -> Result<Option<ChatTemplate>, CalibrationError> {
        let chat = match self.rendering {
            Rendering::Messages { chatml: true, .. } => ChatTemplate::chatml(),
            Rendering::Messages { chatml: false, .. } => {
                let own = ChatTemplate::of(tokenizer.dir())?;
                own.ok_or(CalibrationError::NoChatTemplate)?
            }
            Rendering::Template(_) | Rendering::Tokens { .. } => return Ok(None),
        };
        match &self.date {
            Some(date) if !is_date(date) => Err(CalibrationError::Date { text: date.clone() }),
            Some(date) => Ok(Some(chat.dated(date))),
            None => Ok(Some(chat)),
        }
    }
}
