//! Reads rows of a source as batches of documents, on a separate thread while others tokenize.

use std::collections::HashSet;
use std::ops::{AddAssign, ControlFlow};

use crate::chat::ChatTemplate;
use crate::rendering::Document;
use crate::row::{Reading, Row};
use crate::row_range::RangePosition;
use crate::source_file::SourceFile;
use crate::token_rows::TokenRules;
use crate::value::Value;
use crate::{CalibrationError, CalibrationSettings, OnError, reader};

/// Maximum number of documents and of bytes in a batch.
const BATCH_DOCUMENTS: usize = 256;
const BATCH_BYTES: usize = 1 << 20;

/// Limit on the rows that are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReadLimit {
    /// Rows, including those before the range.
    pub rows: usize,
    /// Bytes of documents.
    pub bytes: usize,
}

impl ReadLimit {
    /// No limit.
    pub(crate) const ALL: ReadLimit = ReadLimit {
        rows: usize::MAX,
        bytes: usize::MAX,
    };
}

/// Passes the documents of `files` in the settings' range of rows to `give`, until the end, until
/// it breaks, or until `most` is reached; returns true if all were passed. Rows that lack a needed
/// column or have a null there, rows without text, and, if the settings say so, rows refused by a
/// chat template are skipped and counted.
///
/// # Errors
/// An unreadable file, a row that cannot be rendered, files that end before the range begins, and a
/// range in which every row is skipped.
pub(crate) fn send(
    settings: &CalibrationSettings,
    files: &[SourceFile],
    chat: Option<&ChatTemplate>,
    rules: &TokenRules,
    most: ReadLimit,
    give: &mut dyn FnMut(Batch) -> ControlFlow<()>,
) -> Result<bool, CalibrationError> {
    let columns = settings.rendering.columns();
    let reading = Reading {
        optional: settings.rendering.optional_columns(),
        ..Reading::of(&columns)
    };
    let mut seen = HashSet::new();
    let mut batch = Batch::default();
    let mut looked = Looked::default();
    let mut first_objection = None;
    let (mut index, mut bytes, mut is_whole) = (0, 0, true);
    for file in files {
        let flow = reader::read(file, &reading, &mut |row| {
            let mended = reading.mended.take();
            if index >= most.rows || bytes >= most.bytes {
                is_whole = false;
                return Ok(ControlFlow::Break(()));
            }
            let place = settings.rows.place(index);
            index += 1;
            match place {
                RangePosition::Before => return Ok(ControlFlow::Continue(())),
                RangePosition::Past => return Ok(ControlFlow::Break(())),
                RangePosition::Inside => looked.at(index - 1, file, &row, &columns),
            }
            let is_null = |column: &&str| row.get(*column).is_none_or(Value::is_null);
            if columns.iter().any(is_null) {
                looked.left_out.nulls += 1;
                batch.left_out.nulls += 1;
                return Ok(ControlFlow::Continue(()));
            }
            let document = match settings.rendering.is_blank(&row) {
                true => None,
                false => {
                    let rendered = settings.rendering.render(index - 1, &row, chat, rules);
                    batch.dated |= chat.is_some_and(ChatTemplate::asked_for_date);
                    let rendered = rendered.map_err(CalibrationError::in_file(&file.path));
                    let (document, masked) = match rendered {
                        Err(error)
                            if error.is_objection() && settings.on_error == OnError::Skip =>
                        {
                            looked.left_out.objections += 1;
                            batch.left_out.objections += 1;
                            first_objection.get_or_insert(error);
                            return Ok(ControlFlow::Continue(()));
                        }
                        other => other?,
                    };
                    batch.masked += masked;
                    Some(document)
                }
            };
            let Some(document) = document.filter(|document| !document.is_empty()) else {
                looked.left_out.blank += 1;
                batch.left_out.blank += 1;
                return Ok(ControlFlow::Continue(()));
            };
            if settings.dedupe && !seen.insert(document.digest()) {
                return Ok(ControlFlow::Continue(()));
            }
            batch.mended += usize::from(mended > 0 && document.is_mended());
            batch.bytes += document.size();
            bytes += document.size();
            batch.documents.push(document);
            let full = batch.documents.len() >= BATCH_DOCUMENTS || batch.bytes >= BATCH_BYTES;
            Ok(match full {
                true => give(batch.take()),
                false => ControlFlow::Continue(()),
            })
        })?;
        if flow.is_break() {
            break;
        }
    }
    if looked.rows == 0 && is_whole {
        return Err(CalibrationError::NoRows {
            range: settings.rows.to_string(),
            available: index,
        });
    }
    if let Some(first) = first_objection.filter(|_| looked.is_all_left_out() && is_whole) {
        return Err(CalibrationError::Objections {
            rows: looked.left_out.objections,
            range: settings.rows.to_string(),
            source: Box::new(first),
        });
    }
    let is_refused = looked.is_all_left_out() && (is_whole || looked.lacks_a_column());
    if let Some(file) = files.first().filter(|_| is_refused) {
        return Err(looked.refusal(settings, file, &columns)?);
    }
    // A receiver that has stopped already has enough.
    let _ = give(batch.take());
    Ok(is_whole)
}

/// Statistics of the rows in the range.
#[derive(Default)]
struct Looked {
    rows: usize,
    left_out: LeftOut,
    /// Error for each needed column that no row has had so far, with the first row's columns.
    missing: Vec<Option<CalibrationError>>,
}

impl Looked {
    /// Records a row of the range.
    fn at(&mut self, index: usize, file: &SourceFile, row: &Row, columns: &[&str]) {
        if self.rows == 0 {
            let lacking = columns.iter().map(|column| {
                let lacks = || CalibrationError::Column {
                    row: index,
                    column: (*column).to_owned(),
                    columns: row.keys().cloned().collect(),
                };
                let lacks = (!row.contains_key(*column)).then(lacks);
                lacks.map(CalibrationError::in_file(&file.path))
            });
            self.missing = lacking.collect();
        }
        self.rows += 1;
        for (missing, column) in self.missing.iter_mut().zip(columns) {
            if missing.is_some() && row.contains_key(*column) {
                *missing = None;
            }
        }
    }

    fn is_all_left_out(&self) -> bool {
        self.rows > 0 && self.left_out.total() == self.rows
    }

    fn lacks_a_column(&self) -> bool {
        self.missing.iter().any(Option::is_some)
    }

    /// Returns the error if there is nothing to calibrate on.
    fn refusal(
        self,
        settings: &CalibrationSettings,
        file: &SourceFile,
        columns: &[&str],
    ) -> Result<CalibrationError, CalibrationError> {
        let mut missing = self.missing.into_iter().flatten();
        if let Some(missing) = missing.next().filter(|_| self.left_out.nulls > 0) {
            return Ok(missing);
        }
        let range = settings.rows.to_string();
        let wanted = columns.iter().map(|column| format!("{column:?}")).collect();
        let there = reader::columns(file)?;
        Ok(match self.left_out.blank {
            0 => CalibrationError::Nulls {
                rows: self.rows,
                range,
                wanted,
                columns: there,
            },
            _ => CalibrationError::NoText {
                rows: self.rows,
                range,
                wanted,
                columns: there,
            },
        })
    }
}

/// Skipped rows, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeftOut {
    /// A needed column is null or missing.
    pub nulls: usize,
    /// The row has no text.
    pub blank: usize,
    /// A chat template refused the row.
    pub objections: usize,
}

impl LeftOut {
    fn total(&self) -> usize {
        self.nulls + self.blank + self.objections
    }
}

impl AddAssign for LeftOut {
    fn add_assign(&mut self, more: LeftOut) {
        self.nulls += more.nulls;
        self.blank += more.blank;
        self.objections += more.objections;
    }
}

/// Documents of consecutive rows.
#[derive(Default)]
pub(crate) struct Batch {
    pub documents: Vec<Document>,
    /// Skipped rows among them. They are counted per batch because the reading thread may be ahead
    /// of the batches that are used.
    pub left_out: LeftOut,
    /// Documents in which halves of surrogate pairs were replaced.
    pub mended: usize,
    /// Positions that masks dropped.
    pub masked: usize,
    /// True if a chat template asked for the date.
    pub dated: bool,
    bytes: usize,
}

impl Batch {
    fn take(&mut self) -> Batch {
        std::mem::take(self)
    }
}
