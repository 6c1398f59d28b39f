//! Every Arrow type is converted to JSON values or refused, in each columnar format.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::*;
use arrow::buffer::{OffsetBuffer, ScalarBuffer};
use arrow::compute::cast;
use arrow::datatypes::{Field, TimeUnit};
use arrow::ipc::writer::{FileWriter, StreamWriter};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::Source;

/// Writes the batch as Parquet, in Arrow's stream format, and in its file format.
fn write(dir: &TempDir, batch: RecordBatch) -> [PathBuf; 3] {
    let [parquet, stream, file] =
        ["rows.parquet", "stream.arrow", "file.arrow"].map(|name| dir.path().join(name));
    let properties = WriterProperties::builder()
        .set_compression(Compression::UNCOMPRESSED)
        .set_statistics_enabled(EnabledStatistics::None)
        .build();
    let schema = batch.schema();
    let new = |path| File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(new(&parquet), schema.clone(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let mut writer = StreamWriter::try_new(new(&stream), &schema).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    let mut writer = FileWriter::try_new(new(&file), &schema).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    [parquet, stream, file]
}

/// Returns the column's values.
fn read(path: &Path, column: &str) -> Result<Vec<Value>, String> {
    let file = &Source::Local(path.into()).files().unwrap()[0];
    let mut values = Vec::new();
    let flow = crate::reader::read(file, &crate::row::Reading::of(&[column]), &mut |row| {
        values.push(row[column].clone());
        Ok(ControlFlow::Continue(()))
    });
    flow.map(|_| values).map_err(|e| e.to_string())
}

/// Checks the values of a column in every format.
fn check(array: ArrayRef, expected: impl Into<Value>) {
    let expected = expected.into();
    let dir = TempDir::new().unwrap();
    let kind = array.data_type().clone();
    for path in write(&dir, RecordBatch::try_from_iter([("x", array)]).unwrap()) {
        let found = read(&path, "x").unwrap_or_else(|e| panic!("{kind}: {e}"));
        assert_eq!(Value::Array(found), expected, "{kind} {path:?}");
    }
}

fn texts() -> ArrayRef {
    Arc::new(StringArray::from(vec![Some("fever"), None, Some("°C")]))
}

fn dictionary_of(values: DataType) -> DataType {
    DataType::Dictionary(Box::new(DataType::Int16), Box::new(values))
}

#[test]
fn every_form_of_text_is_text() {
    let expected = json!(["fever", null, "°C"]);
    for kind in [
        DataType::Utf8,
        DataType::LargeUtf8,
        DataType::Utf8View,
        DataType::Binary,
        DataType::LargeBinary,
        DataType::BinaryView,
        dictionary_of(DataType::Utf8),
        dictionary_of(DataType::LargeUtf8),
    ] {
        check(cast(&texts(), &kind).unwrap(), expected.clone());
    }
}

#[test]
fn lists_of_every_kind_hold_dictionaries_and_structs() {
    let words = cast(&texts(), &dictionary_of(DataType::Utf8)).unwrap();
    let item = Arc::new(Field::new("item", words.data_type().clone(), true));
    let large = LargeListArray::new(
        item.clone(),
        OffsetBuffer::from_lengths([2, 1]),
        words.clone(),
        None,
    );
    check(Arc::new(large), json!([["fever", null], ["°C"]]));
    let (offsets, sizes) = (
        ScalarBuffer::from(vec![1, 0]),
        ScalarBuffer::from(vec![2, 1]),
    );
    let view = ListViewArray::new(item, offsets, sizes, words, None);
    check(Arc::new(view), json!([[null, "°C"], ["fever"]]));

    // A conversation as `datasets` writes it, with dictionary-encoded roles.
    let column = |name: &str, values: [&str; 3], kind: DataType| {
        let values: ArrayRef = Arc::new(StringArray::from(values.to_vec()));
        let values = cast(&values, &kind).unwrap();
        (Arc::new(Field::new(name, kind, true)), values)
    };
    let messages = StructArray::from(vec![
        column(
            "role",
            ["user", "assistant", "user"],
            dictionary_of(DataType::Utf8),
        ),
        column("content", ["a", "b", "c"], DataType::LargeUtf8),
        column("at", ["2024-01-31"; 3], DataType::Date32),
    ]);
    let item = Arc::new(Field::new("item", messages.data_type().clone(), true));
    let offsets = OffsetBuffer::from_lengths([2, 1]);
    let talks = ListArray::new(item, offsets, Arc::new(messages), None);
    let message =
        |role: &str, said: &str| json!({"role": role, "content": said, "at": "2024-01-31"});
    let expected = json!([
        [message("user", "a"), message("assistant", "b")],
        [message("user", "c")]
    ]);
    check(Arc::new(talks), expected);
}

#[test]
fn numbers_dates_times_and_decimals_read_as_they_are_written() {
    check(
        Arc::new(Float32Array::from(vec![0.1, -2.0, f32::NAN])),
        json!([0.1, -2.0, null]),
    );
    let micros = TimestampMicrosecondArray::from(vec![Some(1_706_702_400_500_000), None]);
    check(
        Arc::new(micros.clone()),
        json!(["2024-01-31T12:00:00.500", null]),
    );
    let zoned = micros.with_timezone("Europe/Paris");
    check(Arc::new(zoned), json!(["2024-01-31T12:00:00.500Z", null]));
    let decimals = Decimal128Array::from(vec![12345, -5]).with_precision_and_scale(10, 2);
    check(Arc::new(decimals.unwrap()), json!(["123.45", "-0.05"]));
    let time = Time32SecondArray::from(vec![3661]);
    check(Arc::new(time), json!(["01:01:01"]));
}

#[test]
fn columns_that_are_not_wanted_are_not_decoded() {
    let dir = TempDir::new().unwrap();
    let marker = "a-text-to-be-spoilt";
    let texts = |text: &str| Arc::new(StringArray::from(vec![text; 3])) as ArrayRef;
    let columns = vec![
        ("before", texts(marker)),
        ("x", texts("fever")),
        ("after", texts(marker)),
    ];
    for path in write(&dir, RecordBatch::try_from_iter(columns).unwrap()) {
        let mut bytes = fs::read(&path).unwrap();
        let places: Vec<usize> = (0..bytes.len() - marker.len())
            .filter(|&at| &bytes[at..at + marker.len()] == marker.as_bytes())
            .collect();
        assert!(places.len() >= 2);
        for at in places {
            bytes[at] = 0xff;
        }
        fs::write(&path, bytes).unwrap();
        for column in ["before", "after"] {
            read(&path, column).unwrap_err();
        }
        assert_eq!(
            read(&path, "x").unwrap(),
            vec![json!("fever"); 3],
            "{path:?}"
        );
    }
}

#[test]
fn what_has_no_text_is_refused_with_its_row_column_and_type() {
    let dir = TempDir::new().unwrap();
    let binary: ArrayRef = Arc::new(BinaryArray::from(vec![&b"text"[..], b"\xff\xd8\xff"]));
    for path in write(
        &dir,
        RecordBatch::try_from_iter([("photo", binary)]).unwrap(),
    ) {
        let error = read(&path, "photo").unwrap_err();
        for word in ["row 1", "\"photo\"", "Binary", "not UTF-8"] {
            assert!(error.contains(word), "{word}: {error}");
        }
    }
    let durations: ArrayRef = Arc::new(DurationSecondArray::from(vec![Some(1), None]));
    let kind = DataType::Duration(TimeUnit::Second).to_string();
    for path in write(
        &dir,
        RecordBatch::try_from_iter([("took", durations)]).unwrap(),
    ) {
        let error = read(&path, "took").unwrap_err();
        for word in ["row 0", "\"took\"", &kind] {
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}
