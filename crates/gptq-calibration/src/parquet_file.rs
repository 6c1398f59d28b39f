//! Opens Parquet files by column. Declared sizes are checked before the library uses them: the
//! footer and the page headers are inside the file ([`look_through`]), their counts agree and are
//! within the file's [`ValueBudget`], and the size of a page is limited.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::errors::Result as ParquetResult;
use parquet::file::metadata::ParquetMetaData;
use parquet::file::reader::{ChunkReader, Length};

use crate::CalibrationError;
use crate::columns::{MAX_FOOTER, wanted};
use crate::row::Reading;
use crate::source_file::SourceFile;
use crate::thrift::{Field, look_through};
use crate::value_budget::ValueBudget;

/// Rows decoded at once.
const BATCH: usize = 64;

/// Maximum length of a page header, in bytes.
const LONGEST_HEADER: u64 = 16 << 20;

/// Maximum size of a page, in bytes as decompressed. Writers end a page at about 1 MiB or 1024
/// rows.
const LARGEST_PAGE: i64 = 1 << 30;

/// Returns the rows of `opened`, and the number that its footer declares.
pub(crate) fn open(
    mut opened: File,
    file: &SourceFile,
    reading: &Reading<'_>,
) -> Result<(ParquetRecordBatchReader, u64), CalibrationError> {
    let (metadata, length) = metadata(&mut opened, file)?;
    let pages = Pages {
        file: opened,
        budget: Arc::new(ValueBudget::of(length)),
    };
    let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(pages, metadata);
    let promised = check_counts(builder.metadata()).map_err(|why| file.malformed(why))?;
    let wanted = wanted(builder.schema(), file, reading)?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), wanted);
    let reader = builder.with_projection(mask).with_batch_size(BATCH).build();
    Ok((reader.map_err(|e| file.malformed(e))?, promised))
}

/// Returns the footer's schema.
pub(crate) fn schema(opened: &mut File, file: &SourceFile) -> Result<SchemaRef, CalibrationError> {
    Ok(metadata(opened, file)?.0.schema().clone())
}

/// Returns the footer, and the length of the whole file.
fn metadata(
    opened: &mut File,
    file: &SourceFile,
) -> Result<(ArrowReaderMetadata, u64), CalibrationError> {
    let length = check_footer(opened).map_err(|why| file.malformed(why))?;
    let metadata = ArrowReaderMetadata::load(opened, Default::default());
    Ok((metadata.map_err(|e| file.malformed(e))?, length))
}

/// Checks the footer, which is followed by its length and four bytes of magic. Returns the length
/// of the whole file.
fn check_footer(file: &mut File) -> Result<u64, String> {
    let look = |file: &mut File| {
        let end = file.seek(SeekFrom::End(-8))?;
        let mut length = [0; 4];
        file.read_exact(&mut length)?;
        let length = u64::from(u32::from_le_bytes(length));
        if length > end.min(MAX_FOOTER) {
            let reason = format!("{length} bytes, more than the limit");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        file.seek(SeekFrom::Start(end - length))?;
        look_through(BufReader::new(file.take(length)), &mut |_, _| Ok(()))?;
        Ok(end + 8)
    };
    look(file).map_err(|e| format!("its footer: {e}"))
}

/// Returns the number of rows if the footer is consistent.
fn check_counts(metadata: &ParquetMetaData) -> Result<u64, String> {
    let total = metadata.file_metadata().num_rows();
    let groups = metadata.row_groups();
    let sum: i128 = groups.iter().map(|g| i128::from(g.num_rows())).sum();
    if i128::from(total) != sum || groups.iter().any(|g| g.num_rows() < 0) {
        return Err(format!(
            "its footer declares {total} rows, but its row groups {sum}"
        ));
    }
    for group in groups {
        // A list has any number of values in a row; a flat column has one.
        let flat = group
            .columns()
            .iter()
            .filter(|c| c.column_descr().max_rep_level() == 0);
        for column in flat {
            if column.num_values() != group.num_rows() {
                return Err(format!(
                    "a row group of {} rows has {} values in column {}",
                    group.num_rows(),
                    column.num_values(),
                    column.column_path()
                ));
            }
        }
    }
    Ok(total as u64)
}

/// The file as the library reads it: per page, first the header with [`ChunkReader::get_read`],
/// then the page.
struct Pages {
    file: File,
    budget: Arc<ValueBudget>,
}

impl Length for Pages {
    fn len(&self) -> u64 {
        Length::len(&self.file)
    }
}

impl ChunkReader for Pages {
    type T = PageHeader;

    fn get_read(&self, start: u64) -> ParquetResult<PageHeader> {
        Ok(PageHeader {
            bytes: self.file.get_read(start)?,
            budget: self.budget.clone(),
            checked: false,
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<bytes::Bytes> {
        self.file.get_bytes(start, length)
    }
}

/// Bytes from a page's header on. The header is checked only when it is read, since the library
/// also requests the bytes of headers that it already has.
struct PageHeader {
    bytes: BufReader<File>,
    budget: Arc<ValueBudget>,
    checked: bool,
}

impl Read for PageHeader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.checked {
            let read = check_header(&mut self.bytes, &self.budget)
                .map_err(|e| io::Error::new(e.kind(), format!("a page header: {e}")))?;
            self.bytes.seek_relative(-read.cast_signed())?;
            self.checked = true;
        }
        self.bytes.read(buffer)
    }
}

/// Checks a page's header and returns its length in bytes. Fields are those of `PageHeader` in
/// <https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift>. The
/// library assumes their types whatever the bytes say.
fn check_header(bytes: impl Read, budget: &ValueBudget) -> io::Result<u64> {
    let mut limited = bytes.take(LONGEST_HEADER);
    look_through(&mut limited, &mut |path, field| match (path, field) {
        // Number of values of a data page, a dictionary page, or a data page of version 2.
        ([5 | 7 | 8, 1], Field::Integer(values)) => match u64::try_from(values) {
            Ok(values) if i32::try_from(values).is_ok() => budget.spend(values),
            _ => Err(format!("a page of {values} values")),
        },
        ([2], Field::Integer(size)) if size > LARGEST_PAGE => {
            Err(format!("a page of {size} bytes, over {LARGEST_PAGE}"))
        }
        ([1..=4] | [5 | 7 | 8, 1..=2] | [5 | 8, 3..=4] | [8, 5..=6], Field::Integer(number)) => {
            match i32::try_from(number) {
                Ok(_) => Ok(()),
                Err(_) => Err(format!("{number}, of more than 32 bits")),
            }
        }
        ([5..=8], Field::Struct) => Ok(()),
        ([1..=8] | [5 | 7 | 8, 1..=2] | [5 | 8, 3..=4] | [8, 5..=6], _) => {
            Err("a field has the wrong type".into())
        }
        _ => Ok(()),
    })?;
    Ok(LONGEST_HEADER - limited.limit())
}
