//! Rows of a source as batches of documents, read on a thread of its own while others tokenise.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::mpsc::SyncSender;

use serde_json::Value;

use crate::chat::ChatTemplate;
use crate::rendering::Document;
use crate::row_range::Place;
use crate::source::SourceFile;
use crate::{CalibrationError, CalibrationSettings, reader};

/// A batch is full with this many documents, or this many bytes.
const BATCH_DOCUMENTS: usize = 256;
const BATCH_BYTES: usize = 1 << 20;

/// Sends every document of `files` in the settings' range of rows, until the end or until nobody
/// receives any more. Rows with a null in a column they need are left out and counted. Errors when
/// the files end before the range begins, and when every row is left out.
pub(crate) fn send(
    settings: &CalibrationSettings,
    files: &[SourceFile],
    chat: Option<&ChatTemplate>,
    sender: &SyncSender<Batch>,
) -> Result<(), CalibrationError> {
    let columns = settings.rendering.columns();
    let mut seen = HashSet::new();
    let mut batch = Batch::default();
    let (mut index, mut inside, mut nulls) = (0, 0, 0);
    for file in files {
        let flow = reader::read(file, &columns, &mut |row| {
            let place = settings.rows.place(index);
            index += 1;
            match place {
                Place::Before => return Ok(ControlFlow::Continue(())),
                Place::Past => return Ok(ControlFlow::Break(())),
                Place::Inside => inside += 1,
            }
            let mut cells = columns.iter().map(|column| row.get(*column));
            if cells.any(|cell| cell.is_some_and(Value::is_null)) {
                nulls += 1;
                batch.nulls += 1;
                return Ok(ControlFlow::Continue(()));
            }
            let document = settings.rendering.render(index - 1, &row, chat);
            let document = document.map_err(CalibrationError::in_file(&file.path))?;
            if settings.dedupe && !seen.insert(document.digest()) {
                return Ok(ControlFlow::Continue(()));
            }
            batch.bytes += document.size();
            batch.documents.push(document);
            let full = batch.documents.len() >= BATCH_DOCUMENTS || batch.bytes >= BATCH_BYTES;
            Ok(match full && sender.send(batch.take()).is_err() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            })
        })?;
        if flow.is_break() {
            break;
        }
    }
    if inside == 0 {
        return Err(CalibrationError::NoRows {
            range: settings.rows.to_string(),
            available: index,
        });
    }
    if let Some(file) = files.first().filter(|_| nulls == inside) {
        return Err(CalibrationError::Nulls {
            rows: nulls,
            range: settings.rows.to_string(),
            wanted: columns.iter().map(|column| format!("{column:?}")).collect(),
            columns: reader::columns(file)?,
        });
    }
    // Whoever stopped receiving has what it needs.
    let _ = sender.send(batch.take());
    Ok(())
}

/// Documents of consecutive rows.
#[derive(Default)]
pub(crate) struct Batch {
    pub documents: Vec<Document>,
    /// Rows among them that were left out for a null. They are counted here and not by the thread
    /// that reads, which may be ahead of what is used by more or fewer rows.
    pub nulls: usize,
    bytes: usize,
}

impl Batch {
    fn take(&mut self) -> Batch {
        std::mem::take(self)
    }
}
