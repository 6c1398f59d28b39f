//! Columns of a columnar file, by its schema.

use arrow::datatypes::Schema;

use crate::CalibrationError;
use crate::row::Reading;
use crate::source_file::SourceFile;

/// Largest footer of an Arrow or Parquet file, in bytes.
pub(crate) const MAX_FOOTER: u64 = 64 << 20;

/// Returns the indices of the needed columns.
pub(crate) fn wanted(
    schema: &Schema,
    file: &SourceFile,
    reading: &Reading<'_>,
) -> Result<Vec<usize>, CalibrationError> {
    let place = |column: &&str| {
        schema
            .index_of(column)
            .map_err(|_| CalibrationError::Column {
                row: 0,
                column: (*column).to_owned(),
                columns: names(schema),
            })
    };
    let places = reading.columns.iter().map(place).collect();
    let mut places: Vec<usize> = Result::map_err(places, CalibrationError::in_file(&file.path))?;
    let optional = reading.optional.iter();
    places.extend(optional.filter_map(|column| schema.index_of(column).ok()));
    Ok(places)
}

/// Returns the names of all columns.
pub(crate) fn names(schema: &Schema) -> Vec<String> {
    schema.fields().iter().map(|f| f.name().clone()).collect()
}
