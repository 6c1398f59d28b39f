//! What can be told of calibration rows without reading them all: that their files are there and readable,
//! have the columns, and that the first rows can be rendered and tokenised.

use std::fs::File;
use std::ops::ControlFlow;

use crate::documents::{self, Most};
use crate::reader::{self, Reading};
use crate::source::{Compression, Format, SourceFile};
use crate::{Calibration, CalibrationError, CalibrationSettings, Source, TextTokenizer};

/// So far rows are read.
const ROWS: Most = Most {
    rows: 4096,
    bytes: 1 << 20,
};

/// So many of a source's files are opened.
const FILES: usize = 64;

/// So many documents are tokenised where there are more rows than are read.
const DOCUMENTS: usize = 64;

/// Largest file that is read to its end, in bytes.
const SMALL: u64 = 16 << 20;

impl Calibration {
    /// Checks what a short look at the rows can tell. What should be known, in a line each; rows that are read
    /// to their end are judged as [`Calibration::draw`] judges them. Without a `tokenizer`, what needs one is
    /// left unjudged.
    ///
    /// # Errors
    /// A file that is missing or malformed, columns that are not there, a chat template that does not parse,
    /// and what is wrong with the first rows.
    pub fn first_look(
        settings: &CalibrationSettings,
        tokenizer: Option<&TextTokenizer>,
    ) -> Result<Vec<String>, CalibrationError> {
        if let Source::Dataset { name, files, .. } = &settings.source
            && files.is_empty()
        {
            return Ok(vec![format!(
                "the rows of {name} are not judged here: they are on the Hub, and a run fetches them first"
            )]);
        }
        let files = settings.source.files()?;
        let columns = settings.rendering.columns();
        let mut bytes = 0;
        for file in files.iter().take(FILES) {
            let opened = File::open(&file.path).map_err(CalibrationError::io(&file.path))?;
            let length = opened
                .metadata()
                .map_err(CalibrationError::io(&file.path))?;
            bytes += length.len();
            if !is_packed(file) {
                let once = &mut |_| Ok(ControlFlow::Break(()));
                let _ = reader::read(file, &Reading::of(&columns), once)?;
            }
        }
        // Unpacking a whole file is for the run.
        if files.iter().any(is_packed) && bytes > SMALL {
            return Ok(Vec::new());
        }
        let Some(tokenizer) = tokenizer else {
            return Ok(Vec::new());
        };
        let chat = settings.chat(tokenizer)?;
        let rules = tokenizer.token_rules();
        let mut first = Vec::new();
        let give = &mut |batch: documents::Batch| {
            let room = DOCUMENTS - first.len().min(DOCUMENTS);
            first.extend(batch.documents.into_iter().take(room));
            ControlFlow::Continue(())
        };
        let is_whole = documents::send(settings, &files, chat.as_ref(), &rules, ROWS, give)?;
        if is_whole && files.len() <= FILES && bytes <= SMALL {
            return Ok(Calibration::draw(settings, tokenizer)?.warnings());
        }
        let difference = tokenizer.difference(&first)?;
        tokenizer.encode_all(first)?;
        Ok(difference.iter().map(ToString::to_string).collect())
    }
}

/// Whether a file has to be unpacked as a whole before a row of it can be read.
fn is_packed(file: &SourceFile) -> bool {
    matches!(file.format, Format::Parquet | Format::Arrow) && file.compression != Compression::None
}
