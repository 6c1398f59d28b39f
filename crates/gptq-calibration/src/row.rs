//! A row of a file, and the columns that are read of it.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::rc::Rc;

use crate::CalibrationError;
use crate::value::{Map, Value};

/// Column names and values.
pub type Row = Map;

/// Takes one row; breaks when no more are needed.
pub type EachRow<'a> = dyn FnMut(Row) -> Result<ControlFlow<()>, CalibrationError> + 'a;

/// Column of rows that are plain text.
pub(crate) const TEXT: &str = "text";

/// Columns that are read.
#[derive(Default)]
pub(crate) struct Reading<'a> {
    /// Required columns of a columnar file; other formats read every column.
    pub columns: &'a [&'a str],
    /// Columns that are read if present.
    pub optional: &'a [&'a str],
    /// Unpaired surrogates replaced since this was last reset.
    pub mended: Rc<Cell<usize>>,
}

impl<'a> Reading<'a> {
    pub(crate) fn of(columns: &'a [&'a str]) -> Self {
        Reading {
            columns,
            ..Reading::default()
        }
    }
}

/// Makes a row of one text.
pub(crate) fn text_row(text: String) -> Row {
    Row::from_iter([(TEXT.to_owned(), Value::String(text))])
}
