//! Reads rows of Parquet and Arrow files in batches, and only the columns that are needed. Arrow
//! files may be in the stream format, which Hugging Face `datasets` writes, or in the file format.
//!
//! Values become JSON values: strings and bytes that are UTF-8, numbers, booleans, lists, structs,
//! and dates, times and decimals as strings; other types are refused by name, also within lists and
//! structs. The number of values is limited by the file's size ([`ValueBudget`]).

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, make_array};
use arrow::datatypes::{
    DataType, Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type,
    Schema, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow::error::ArrowError;
use arrow::ipc::convert::try_fb_to_schema;
use arrow::ipc::reader::{FileReader, StreamReader, read_footer_length};
use arrow::ipc::{Block, root_as_footer};
use arrow::util::display::{ArrayFormatter, FormatOptions};

use crate::columns::{MAX_FOOTER, names, wanted};
use crate::row::{EachRow, Reading, Row};
use crate::source_file::SourceFile;
use crate::value::{Map, Value};
use crate::value_budget::ValueBudget;
use crate::{CalibrationError, parquet_file};

/// Largest columnar file that is decompressed from gzip or zstd, in bytes as decompressed: it has
/// to be on disk to be read by columns.
const LARGEST_UNPACKED: u64 = 4 << 30;

/// First and last bytes of an Arrow file in the file format.
const ARROW_FILE: &[u8; 6] = b"ARROW1";

/// Kind of columnar file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ColumnarFormat {
    Parquet,
    Arrow,
}

/// Calls `each` with every row until it breaks; errors if a needed column is missing.
pub(crate) fn read(
    format: ColumnarFormat,
    opened: File,
    file: &SourceFile,
    reading: &Reading<'_>,
    each: &mut EachRow<'_>,
) -> Result<ControlFlow<()>, CalibrationError> {
    refuse_panics(file, || match format {
        ColumnarFormat::Parquet => parquet(opened, file, reading, each),
        ColumnarFormat::Arrow => arrow(opened, file, reading, each),
    })
}

/// Returns the names of all columns.
pub(crate) fn columns(
    format: ColumnarFormat,
    mut opened: File,
    file: &SourceFile,
) -> Result<Vec<String>, CalibrationError> {
    refuse_panics(file, || {
        let schema = match format {
            ColumnarFormat::Parquet => parquet_file::schema(&mut opened, file)?,
            ColumnarFormat::Arrow => arrow_schema(&mut opened, file)?.0.into(),
        };
        Ok(names(&schema))
    })
}

/// Converts panics into errors: both libraries panic on some malformed files.
fn refuse_panics<T>(
    file: &SourceFile,
    read: impl FnOnce() -> Result<T, CalibrationError>,
) -> Result<T, CalibrationError> {
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(file.malformed("the file is malformed")))
}

/// Copies a decompressed file to an unnamed temporary one.
pub(crate) fn spool(packed: impl Read, file: &SourceFile) -> Result<File, CalibrationError> {
    let mut unpacked =
        tempfile::tempfile().map_err(|source| CalibrationError::Scratch { source })?;
    let copied = io::copy(&mut packed.take(LARGEST_UNPACKED + 1), &mut unpacked);
    if copied.map_err(|e| file.malformed(e))? > LARGEST_UNPACKED {
        let reason = "over 4 GiB when decompressed; decompress it first";
        return Err(file.malformed(reason));
    }
    unpacked
        .seek(SeekFrom::Start(0))
        .map_err(|source| CalibrationError::Scratch { source })?;
    Ok(unpacked)
}

fn parquet(
    opened: File,
    file: &SourceFile,
    reading: &Reading<'_>,
    each: &mut EachRow<'_>,
) -> Result<ControlFlow<()>, CalibrationError> {
    let length = length(&opened, file)?;
    let (batches, promised) = parquet_file::open(opened, file, reading)?;
    let (flow, rows) = batches_to_rows(batches, length, file, reading, each)?;
    if flow.is_continue() && rows != promised {
        let reason = format!("its footer declares {promised} rows, but it holds {rows}");
        return Err(file.malformed(reason));
    }
    Ok(flow)
}

fn arrow(
    mut opened: File,
    file: &SourceFile,
    reading: &Reading<'_>,
    each: &mut EachRow<'_>,
) -> Result<ControlFlow<()>, CalibrationError> {
    let (schema, is_file) = arrow_schema(&mut opened, file)?;
    let wanted = Some(wanted(&schema, file, reading)?);
    let length = length(&opened, file)?;
    let buffered = BufReader::new(opened);
    let (flow, _) = if is_file {
        let batches = FileReader::try_new(buffered, wanted).map_err(|e| file.malformed(e))?;
        batches_to_rows(batches, length, file, reading, each)?
    } else {
        let batches = StreamReader::try_new(buffered, wanted).map_err(|e| file.malformed(e))?;
        batches_to_rows(batches, length, file, reading, each)?
    };
    Ok(flow)
}

/// Returns the schema, and true for the file format. Leaves `opened` at its start.
fn arrow_schema(opened: &mut File, file: &SourceFile) -> Result<(Schema, bool), CalibrationError> {
    let mut magic = Vec::new();
    (&*opened)
        .take(ARROW_FILE.len() as u64)
        .read_to_end(&mut magic)
        .and_then(|_| opened.seek(SeekFrom::Start(0)))
        .map_err(CalibrationError::io(&file.path))?;
    let is_file = magic == ARROW_FILE;
    let schema = match is_file {
        true => check_footer(opened),
        false => stream_schema(opened),
    };
    Ok((schema.map_err(|why| file.malformed(why))?, is_file))
}

/// Reads the schema at the start of the stream format. Leaves `file` at its start.
fn stream_schema(file: &mut File) -> Result<Schema, String> {
    let stream = StreamReader::try_new(BufReader::new(&*file), None);
    let schema = stream.map_err(|e| e.to_string())?.schema();
    file.seek(SeekFrom::Start(0)).map_err(|e| e.to_string())?;
    Ok(Schema::clone(&schema))
}

/// Checks that the footer and the blocks it refers to are inside the file, since the library
/// allocates memory by their lengths before reading. Returns the footer's schema; leaves `file` at
/// its start.
fn check_footer(file: &mut File) -> Result<Schema, String> {
    let end = file.seek(SeekFrom::End(-10)).map_err(|e| e.to_string())?;
    let mut tail = [0; 10];
    file.read_exact(&mut tail).map_err(|e| e.to_string())?;
    let length = read_footer_length(tail).map_err(|e| e.to_string())? as u64;
    if length > end.min(MAX_FOOTER) {
        return Err(format!("a footer of {length} bytes, more than the limit"));
    }
    let mut footer = vec![0; length as usize];
    file.seek(SeekFrom::Start(end - length))
        .and_then(|_| file.read_exact(&mut footer))
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .map_err(|e| e.to_string())?;
    let footer = root_as_footer(&footer).map_err(|e| format!("its footer: {e}"))?;
    let batches = footer.recordBatches().into_iter().flatten();
    let blocks = batches.chain(footer.dictionaries().into_iter().flatten());
    let inside = |block: &Block| {
        let lengths = [
            block.offset(),
            block.metaDataLength().into(),
            block.bodyLength(),
        ];
        let sum = lengths.iter().try_fold(0, |sum: u64, &length| {
            sum.checked_add(u64::try_from(length).ok()?)
        });
        sum.is_some_and(|sum| sum <= end)
    };
    if !blocks.into_iter().all(inside) {
        return Err("its footer points outside the file".into());
    }
    let schema = footer.schema().ok_or("its footer has no schema")?;
    try_fb_to_schema(schema).map_err(|e| format!("its footer: {e}"))
}

/// Returns the length in bytes.
fn length(opened: &File, file: &SourceFile) -> Result<u64, CalibrationError> {
    let metadata = opened
        .metadata()
        .map_err(CalibrationError::io(&file.path))?;
    Ok(metadata.len())
}

/// Passes rows to `each` and counts them; refuses more rows or values than a file of this length in
/// bytes may have.
fn batches_to_rows(
    batches: impl Iterator<Item = Result<RecordBatch, ArrowError>>,
    length: u64,
    file: &SourceFile,
    reading: &Reading<'_>,
    each: &mut EachRow<'_>,
) -> Result<(ControlFlow<()>, u64), CalibrationError> {
    let budget = ValueBudget::of(length);
    let mut rows = 0;
    for batch in batches {
        let batch = batch.map_err(|e| file.malformed(e))?;
        let mut arrays: Vec<(&str, ArrayRef)> = Vec::new();
        for &column in reading.columns {
            let array = batch.column_by_name(column);
            let array = array.ok_or_else(|| file.malformed("a batch lacks a column"))?;
            arrays.push((column, array.clone()));
        }
        for &column in reading.optional {
            let array = batch.column_by_name(column);
            arrays.extend(array.map(|array| (column, array.clone())));
        }
        for i in 0..batch.num_rows() {
            let mut row = Row::new();
            for (column, array) in &arrays {
                let cell = value(array, i, &budget).map_err(|why| {
                    file.malformed(format!("row {rows}, column {column:?}: {why}"))
                })?;
                row.insert((*column).to_owned(), cell);
            }
            rows += 1;
            if each(row)?.is_break() {
                return Ok((ControlFlow::Break(()), rows));
            }
        }
    }
    Ok((ControlFlow::Continue(()), rows))
}

fn value(array: &dyn Array, i: usize, budget: &ValueBudget) -> Result<Value, String> {
    budget.spend(1)?;
    resolved(array, i, budget)
}

/// Converts a value that the budget already covers.
fn resolved(array: &dyn Array, i: usize, budget: &ValueBudget) -> Result<Value, String> {
    if array.is_null(i) {
        return Ok(Value::Null);
    }
    let list = |values: ArrayRef| {
        let items = (0..values.len()).map(|j| value(&values, j, budget));
        items.collect::<Result<Vec<_>, _>>().map(Value::Array)
    };
    Ok(match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().value(i).into(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(i).into(),
        DataType::Utf8View => array.as_string_view().value(i).into(),
        DataType::Binary => bytes(array, array.as_binary::<i32>().value(i))?,
        DataType::LargeBinary => bytes(array, array.as_binary::<i64>().value(i))?,
        DataType::BinaryView => bytes(array, array.as_binary_view().value(i))?,
        DataType::FixedSizeBinary(_) => bytes(array, array.as_fixed_size_binary().value(i))?,
        DataType::Boolean => array.as_boolean().value(i).into(),
        DataType::Int8 => array.as_primitive::<Int8Type>().value(i).into(),
        DataType::Int16 => array.as_primitive::<Int16Type>().value(i).into(),
        DataType::Int32 => array.as_primitive::<Int32Type>().value(i).into(),
        DataType::Int64 => array.as_primitive::<Int64Type>().value(i).into(),
        DataType::UInt8 => array.as_primitive::<UInt8Type>().value(i).into(),
        DataType::UInt16 => array.as_primitive::<UInt16Type>().value(i).into(),
        DataType::UInt32 => array.as_primitive::<UInt32Type>().value(i).into(),
        DataType::UInt64 => array.as_primitive::<UInt64Type>().value(i).into(),
        DataType::Float16 => float(array.as_primitive::<Float16Type>().value(i).into()),
        DataType::Float32 => float(array.as_primitive::<Float32Type>().value(i)),
        DataType::Float64 => array.as_primitive::<Float64Type>().value(i).into(),
        DataType::List(_) => list(array.as_list::<i32>().value(i))?,
        DataType::LargeList(_) => list(array.as_list::<i64>().value(i))?,
        DataType::ListView(_) => list(array.as_list_view::<i32>().value(i))?,
        DataType::LargeListView(_) => list(array.as_list_view::<i64>().value(i))?,
        DataType::FixedSizeList(..) => list(array.as_fixed_size_list().value(i))?,
        DataType::Struct(fields) => {
            let members = fields.iter().zip(array.as_struct().columns());
            let mut object = Map::new();
            for (field, member) in members {
                object.insert(field.name().clone(), value(member, i, budget)?);
            }
            Value::Object(object)
        }
        // One value at a time: a long string under many keys would fill memory as a plain array.
        DataType::Dictionary(..) => {
            let dictionary = array.as_any_dictionary();
            let values = dictionary.values();
            let key = resolved(dictionary.keys(), i, budget)?;
            let key = key.as_u64().and_then(|key| usize::try_from(key).ok());
            let key = key.filter(|key| *key < values.len());
            resolved(values, key.ok_or("a key outside its dictionary")?, budget)?
        }
        DataType::Timestamp(unit, Some(_)) => {
            // The value is in UTC, whatever time zone is set for display.
            let utc = DataType::Timestamp(*unit, None);
            let one = array.slice(i, 1).to_data().into_builder().data_type(utc);
            let one = make_array(one.build().map_err(|e| e.to_string())?);
            (shown(&one, 0)? + "Z").into()
        }
        DataType::Date32
        | DataType::Date64
        | DataType::Time32(_)
        | DataType::Time64(_)
        | DataType::Timestamp(_, None)
        | DataType::Decimal32(..)
        | DataType::Decimal64(..)
        | DataType::Decimal128(..)
        | DataType::Decimal256(..) => shown(array, i)?.into(),
        DataType::Null => Value::Null,
        other => {
            return Err(format!(
                "its Arrow type {other} is not supported; write it as text"
            ));
        }
    })
}

/// Returns the shortest number that reads back as this one: 0.1, not 0.10000000149011612.
fn float(value: f32) -> Value {
    value
        .to_string()
        .parse::<f64>()
        .map_or(Value::Null, Value::from)
}

fn bytes(array: &dyn Array, bytes: &[u8]) -> Result<Value, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| {
        let kind = array.data_type();
        format!("its Arrow type is {kind}, and these bytes are not UTF-8 text; write it as text")
    });
    Ok(text?.into())
}

/// Formats a value as Arrow does.
fn shown(array: &dyn Array, i: usize) -> Result<String, String> {
    let options = FormatOptions::default();
    let formatter = ArrayFormatter::try_new(array, &options).map_err(|e| e.to_string())?;
    let text = formatter.value(i).try_to_string();
    text.map_err(|e| e.to_string())
}

#[cfg(test)]
mod limits;
#[cfg(test)]
mod types;
