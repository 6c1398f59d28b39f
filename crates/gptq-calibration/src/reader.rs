//! Reads rows of one file one at a time: at most one row of a text format or one batch of a
//! columnar one is in memory.
//!
//! | file | a row |
//! |---|---|
//! | `.json` | an element of the list, or of the one list in the object; a string is the column `text` |
//! | `.json` of several objects | an object, as in `.jsonl` |
//! | `.jsonl` | a line |
//! | `.csv` | a record; the first names the columns |
//! | `.txt` | a line, in the column `text` |
//! | `.parquet`, `.arrow` | a row ([`columnar`]) |

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::ops::ControlFlow;
use std::rc::Rc;

use crate::CalibrationError;
use crate::columnar::{self, ColumnarFormat};
use crate::json::{self, Opening};
use crate::lenient_json::Lenient;
use crate::row::{EachRow, Reading, text_row};
use crate::source_file::{Compression, RowFormat, SourceFile};
use crate::value::Value;

/// Maximum length of a row in a text format, in bytes as decompressed; guards against compression
/// bombs.
const LONGEST_ROW: u64 = 16 << 20;

/// Maximum number of columns of a `.csv` file.
const MAX_COLUMNS: usize = 1 << 12;

/// Calls `each` with every row of `file` until it breaks.
pub(crate) fn read(
    file: &SourceFile,
    reading: &Reading<'_>,
    each: &mut EachRow<'_>,
) -> Result<ControlFlow<()>, CalibrationError> {
    if let Some(kind) = columnar_format(file) {
        return columnar::read(kind, open_columnar(file)?, file, reading, each);
    }
    let mut unpacked = decompress(open(file)?, file)?;
    let opening = match file.format {
        RowFormat::Json => json::look(&mut unpacked, LONGEST_ROW).map_err(|e| file.malformed(e))?,
        _ => Opening::default(),
    };
    let since_row = Rc::new(Cell::new(0));
    let metered = BufReader::new(Metered {
        inner: Cursor::new(opening.bytes).chain(unpacked),
        since_row: since_row.clone(),
    });
    let mut each = |row| {
        since_row.set(0);
        each(row)
    };
    match file.format {
        RowFormat::Json => {
            let lenient = Lenient::new(metered, reading.mended.clone());
            match opening.is_rows {
                true => json::read_rows(lenient, file, &mut each),
                false => json::read_list(lenient, file, &mut each),
            }
        }
        RowFormat::Csv => csv(metered, file, &mut each),
        // An empty line is a separator, not a row.
        RowFormat::JsonLines => lines(metered, file, &mut |number, line| {
            if line.trim().is_empty() {
                return Ok(ControlFlow::Continue(()));
            }
            let row = json::row(line, &reading.mended);
            each(row.map_err(|why| file.malformed(format!("line {number}: {why}")))?)
        }),
        _ => lines(metered, file, &mut |_, line| each(text_row(line.into()))),
    }
}

/// Returns the names of all columns; of the first row, where rows may differ.
pub(crate) fn columns(file: &SourceFile) -> Result<Vec<String>, CalibrationError> {
    if let Some(kind) = columnar_format(file) {
        return columnar::columns(kind, open_columnar(file)?, file);
    }
    let mut columns = Vec::new();
    let _ = read(file, &Reading::default(), &mut |row| {
        columns = row.keys().cloned().collect();
        Ok(ControlFlow::Break(()))
    })?;
    Ok(columns)
}

fn columnar_format(file: &SourceFile) -> Option<ColumnarFormat> {
    match file.format {
        RowFormat::Parquet => Some(ColumnarFormat::Parquet),
        RowFormat::Arrow => Some(ColumnarFormat::Arrow),
        _ => None,
    }
}

fn open(file: &SourceFile) -> Result<File, CalibrationError> {
    File::open(&file.path).map_err(CalibrationError::io(&file.path))
}

/// Opens the file, decompressed.
fn open_columnar(file: &SourceFile) -> Result<File, CalibrationError> {
    let opened = open(file)?;
    match file.compression {
        Compression::None => Ok(opened),
        _ => columnar::spool(decompress(opened, file)?, file),
    }
}

/// Decompresses `opened` while it is read.
pub(crate) fn decompress(
    opened: File,
    file: &SourceFile,
) -> Result<Box<dyn Read>, CalibrationError> {
    Ok(match file.compression {
        Compression::None => Box::new(opened),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(BufReader::new(opened))),
        Compression::Zstd => Box::new(
            zstd::stream::read::Decoder::new(opened).map_err(CalibrationError::io(&file.path))?,
        ),
    })
}

/// Reader that fails if a single row is longer than [`LONGEST_ROW`].
struct Metered<R> {
    inner: R,
    since_row: Rc<Cell<u64>>,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        let total = self.since_row.get() + n as u64;
        self.since_row.set(total);
        match total > LONGEST_ROW {
            true => Err(io::Error::other("a single row is over 16 MiB")),
            false => Ok(n),
        }
    }
}

/// Control flow after a line: continue, stop, or an error.
type LineFlow = Result<ControlFlow<()>, CalibrationError>;

/// Iterates over lines, numbered from 1, without line endings.
fn lines(
    mut reader: impl BufRead,
    file: &SourceFile,
    each: &mut dyn FnMut(usize, &str) -> LineFlow,
) -> LineFlow {
    let mut bytes = Vec::new();
    for number in 1.. {
        bytes.clear();
        let read = reader.read_until(b'\n', &mut bytes);
        if read.map_err(|e| file.malformed(e))? == 0 {
            break;
        }
        let line = std::str::from_utf8(&bytes)
            .map_err(|_| file.malformed(format!("line {number} is not UTF-8 text")))?;
        let line = match number {
            1 => line.trim_start_matches('\u{feff}'),
            _ => line,
        };
        let line = line.trim_end_matches(['\n', '\r']);
        if each(number, line)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn csv(
    reader: impl Read,
    file: &SourceFile,
    each: &mut EachRow<'_>,
) -> Result<ControlFlow<()>, CalibrationError> {
    let mut reader = csv::Reader::from_reader(reader);
    let headers = reader.headers().map_err(|e| file.malformed(e))?.clone();
    if headers.len() > MAX_COLUMNS {
        let reason = format!("{} columns, over {MAX_COLUMNS}", headers.len());
        return Err(file.malformed(reason));
    }
    for record in reader.records() {
        let record = record.map_err(|e| file.malformed(e))?;
        let cells = record.iter().map(|cell| Value::String(cell.to_owned()));
        let names = headers.iter().enumerate();
        // A byte-order mark would become part of the first column's name.
        let names = names.map(|(i, name)| match i {
            0 => name.trim_start_matches('\u{feff}').to_owned(),
            _ => name.to_owned(),
        });
        if each(names.zip(cells).collect())?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}
