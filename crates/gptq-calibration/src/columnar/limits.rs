//! Columnar files that declare more than they hold are refused quickly; valid files of many values
//! are read.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{FixedSizeListArray, Int32Array, ListArray, NullArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::Field;
use arrow::ipc::writer::StreamWriter;
use parquet::arrow::ArrowWriter;
use tempfile::TempDir;

use super::*;
use crate::Source;

/// Counts the rows, and the values in the lists of column `ids`.
fn count(path: &Path) -> Result<(u64, usize), String> {
    let file = &Source::Local(path.into()).files().unwrap()[0];
    let (mut rows, mut items) = (0, 0);
    let _ = crate::reader::read(file, &crate::row::Reading::of(&["ids"]), &mut |row| {
        rows += 1;
        items += row["ids"].as_array().map_or(0, Vec::len);
        Ok(ControlFlow::Continue(()))
    })
    .map_err(|e| e.to_string())?;
    Ok((rows, items))
}

/// Builds lists of `lengths` of these items as the column `ids`.
fn lists(items: ArrayRef, lengths: impl IntoIterator<Item = usize>) -> RecordBatch {
    let item = Arc::new(Field::new("item", items.data_type().clone(), true));
    let offsets = OffsetBuffer::from_lengths(lengths);
    let lists: ArrayRef = Arc::new(ListArray::new(item, offsets, items, None));
    RecordBatch::try_from_iter([("ids", lists)]).unwrap()
}

fn parquet_file(batch: &RecordBatch) -> Vec<u8> {
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
    writer.write(batch).unwrap();
    writer.into_inner().unwrap()
}

#[test]
fn what_a_fuzzer_found_to_be_slow_is_read_or_refused_soon() {
    let root = [env!("CARGO_MANIFEST_DIR"), "../../fuzz/corpus"];
    let root: std::path::PathBuf = root.iter().collect();
    let mut found = 0;
    for kind in ["parquet", "arrow"] {
        for entry in fs::read_dir(root.join(format!("rows_{kind}"))).unwrap() {
            let dir = TempDir::new().unwrap();
            let path = dir.path().join(format!("rows.{kind}"));
            fs::copy(entry.unwrap().path(), &path).unwrap();
            let file = &Source::Local(path.clone()).files().unwrap()[0];
            let since = Instant::now();
            let read = crate::reader::read(
                file,
                &crate::row::Reading::of(&["input", "output"]),
                &mut |_| Ok(ControlFlow::Continue(())),
            );
            // Without limits these took minutes; a file of a kilobyte takes milliseconds.
            assert!(since.elapsed() < Duration::from_secs(5), "{read:?}");
            if let Err(error) = read {
                let error = error.to_string();
                assert!(!error.contains('\n'), "{error}");
            }
            found += 1;
        }
    }
    assert!(found > 50, "{found}");
    let file = root.join("rows_parquet/header-with-a-list-that-is-not-there");
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("rows.parquet");
    fs::copy(file, &path).unwrap();
    let file = &Source::Local(path).files().unwrap()[0];
    let read = crate::reader::read(file, &crate::row::Reading::of(&["output"]), &mut |_| {
        Ok(ControlFlow::Continue(()))
    });
    let error = read.unwrap_err().to_string();
    assert!(
        error.contains("rows.parquet: ") && error.contains("a page header: "),
        "{error}"
    );
}

#[test]
fn a_small_file_that_promises_millions_of_values_is_refused_with_the_limit() {
    let dir = TempDir::new().unwrap();
    let many = 3 << 22;
    let parquet = dir.path().join("run.parquet");
    // A run of nulls takes only a few bytes.
    let nulls: ArrayRef = Arc::new(Int32Array::new_null(many));
    fs::write(&parquet, parquet_file(&lists(nulls, [many]))).unwrap();
    assert!(fs::metadata(&parquet).unwrap().len() < 1 << 14);

    // Nulls without a type take no bytes at all, and neither do lists of a size fixed by the
    // schema.
    let nothing: ArrayRef = Arc::new(NullArray::new(i32::MAX as usize));
    let long = lists(nothing.clone(), [i32::MAX as usize]);
    let item = Arc::new(Field::new("item", DataType::Null, true));
    let fixed = FixedSizeListArray::new(item, i32::MAX, nothing, None);
    let fixed = RecordBatch::try_from_iter([("ids", Arc::new(fixed) as ArrayRef)]).unwrap();
    let rows: ArrayRef = Arc::new(NullArray::new(1 << 40));
    let rows = RecordBatch::try_from_iter([("ids", rows)]).unwrap();
    let mut paths = vec![parquet];
    for (name, batch) in [("offsets", long), ("fixed", fixed), ("rows", rows)] {
        let path = dir.path().join(format!("{name}.arrow"));
        let file = File::create(&path).unwrap();
        let mut writer = StreamWriter::try_new(file, &batch.schema()).unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        paths.push(path);
    }
    for path in paths {
        let since = Instant::now();
        let error = count(&path).unwrap_err();
        assert!(since.elapsed() < Duration::from_secs(30), "{path:?}");
        let name = path.file_name().unwrap().to_str().unwrap();
        let said = error.contains(name) && error.contains("256 for each byte, and 4194304");
        assert!(said && !error.contains('\n'), "{error}");
    }
}

#[test]
fn a_large_row_group_of_padded_token_ids_is_read() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("ids.parquet");
    // More than the minimum budget: 5 million, of which the last 224 of each 256 are padding.
    let (rows, length) = (20_000, 256);
    let id = |i: usize| match i % length < 32 {
        true => (i as i32).wrapping_mul(0x9e37_79b1_u32 as i32) & 0x7fff,
        false => 0,
    };
    let ids: ArrayRef = Arc::new(Int32Array::from_iter_values((0..rows * length).map(id)));
    fs::write(&path, parquet_file(&lists(ids, vec![length; rows]))).unwrap();
    assert_eq!(count(&path).unwrap(), (rows as u64, rows * length));
}
