//! Checks of calibration rows that need not read them all: that their files exist and are readable,
//! have the columns, and that the first rows can be rendered and tokenized.

use std::fs::File;
use std::ops::ControlFlow;

use crate::documents::{self, ReadLimit};
use crate::row::Reading;
use crate::source_file::{Compression, RowFormat, SourceFile};
use crate::{Calibration, CalibrationError, CalibrationSettings, Source, TextTokenizer, reader};

/// Limit on the rows read.
const ROWS: ReadLimit = ReadLimit {
    rows: 4096,
    bytes: 1 << 20,
};

/// Maximum number of a source's files that are opened.
const FILES: usize = 64;

/// Number of documents tokenized if there are more rows than are read.
const DOCUMENTS: usize = 64;

/// Largest file that is read to its end, in bytes.
const SMALL: u64 = 16 << 20;

/// Checks as much of the rows as a short look allows, and returns warnings, one line each.
/// Files read to the end get all checks of [`Calibration::draw`]. Checks that need a
/// `tokenizer` are skipped without one.
///
/// # Errors
/// A missing or malformed file, missing columns, a chat template that does not parse, and
/// errors in the first rows.
pub fn first_look(
    settings: &CalibrationSettings,
    tokenizer: Option<&TextTokenizer>,
) -> Result<Vec<String>, CalibrationError> {
    if let Source::Dataset { name, files, .. } = &settings.source
        && files.is_empty()
    {
        return Ok(vec![format!(
            "the rows of {name} are not checked: they are on the Hub, and a run downloads them first"
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
    // Decompressing a large file is left to the run.
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

/// Returns true if a file must be decompressed as a whole before any row can be read.
fn is_packed(file: &SourceFile) -> bool {
    matches!(file.format, RowFormat::Parquet | RowFormat::Arrow)
        && file.compression != Compression::None
}
