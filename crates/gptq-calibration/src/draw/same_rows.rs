//! Generated rows give the same windows and counts in every format they can be written in.

use std::fs;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use arrow::array::{ArrayRef, Int64Array, ListArray, RecordBatch, StringArray};
use arrow::datatypes::Int64Type;
use arrow::ipc::writer::{FileWriter, StreamWriter};
use parquet::arrow::ArrowWriter;
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::Template;
use crate::{OnError, Rendering, Source, first_look};

fn tokenizer() -> &'static TextTokenizer {
    static ONCE: OnceLock<TextTokenizer> = OnceLock::new();
    ONCE.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        TextTokenizer::load(&root.join("tests/models/medi-tiny")).unwrap()
    })
}

/// Returns a batch as Parquet and in both Arrow formats.
fn columnar(batch: &RecordBatch) -> Vec<(&'static str, Vec<u8>)> {
    let schema = batch.schema();
    let mut parquet = ArrowWriter::try_new(Vec::new(), schema.clone(), None).unwrap();
    parquet.write(batch).unwrap();
    let mut stream = StreamWriter::try_new(Vec::new(), &schema).unwrap();
    stream.write(batch).unwrap();
    let mut file = FileWriter::try_new(Vec::new(), &schema).unwrap();
    file.write(batch).unwrap();
    vec![
        ("rows.parquet", parquet.into_inner().unwrap()),
        ("stream.arrow", stream.into_inner().unwrap()),
        ("file.arrow", file.into_inner().unwrap()),
    ]
}

/// Returns what was drawn from such a file, or `None` if it was refused.
fn drawn(
    name: &str,
    bytes: &[u8],
    settings: &CalibrationSettings,
) -> Option<(Vec<Vec<u32>>, Manifest)> {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    let settings = CalibrationSettings {
        source: Source::Local(path),
        ..settings.clone()
    };
    let drawn = Calibration::draw(&settings, tokenizer()).ok()?;
    // A first look finds no error in a file that can be drawn from.
    first_look(&settings, Some(tokenizer())).unwrap();
    Some((drawn.windows, drawn.manifest))
}

fn settings(rendering: Rendering, first: usize, dedupe: bool, all: bool) -> CalibrationSettings {
    CalibrationSettings {
        source: Source::Local("".into()),
        rendering,
        rows: format!("{first}:").parse().unwrap(),
        min_tokens: 0,
        dedupe,
        on_error: OnError::Stop,
        date: None,
        samples: 2,
        seq_len: 8,
        seed: 5,
        sampling: match all {
            true => Sampling::RandomWindows,
            false => Sampling::Concatenate,
        },
    }
}

/// Generates a row's cell: missing, null, or a string. U+FFFD stands for an unpaired surrogate in
/// formats that have them.
fn cell() -> impl Strategy<Value = Option<Option<String>>> {
    let text = prop_oneof![
        6 => "[a-z ,.\"'é咳]{0,40}",
        2 => "[ \t\u{a0}]{0,3}",
        2 => "(Fever|cough|\u{fffd}|,|\"){1,6}",
    ];
    prop_oneof![
        1 => Just(None),
        1 => Just(Some(None)),
        8 => text.prop_map(|text| Some(Some(text))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn texts_are_the_same_windows_in_every_format(
        cells in prop::collection::vec(cell(), 1..30), first in 0usize..3, dedupe in any::<bool>(),
        all in any::<bool>(),
    ) {
        let object = |(i, cell): (usize, &Option<Option<String>>)| {
            // Another column holds numbers that JSON does not have.
            let mut row = format!("{{\"n\": {}", ["NaN", "-Infinity", "1e999", "7"][i % 4]);
            if let Some(cell) = cell {
                row += &format!(", \"text\": {}", json!(cell).to_string().replace('\u{fffd}', "\\ud83d"));
            }
            row + "}"
        };
        let objects: Vec<String> = cells.iter().enumerate().map(object).collect();
        let flat: Vec<Option<&str>> = cells.iter().map(|cell| cell.as_ref()?.as_deref()).collect();
        let column: ArrayRef = Arc::new(StringArray::from(flat.clone()));
        let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(0..flat.len() as i64));
        let batch = RecordBatch::try_from_iter([("n", numbers), ("text", column)]).unwrap();
        let mut csv = csv::Writer::from_writer(Vec::new());
        csv.write_record(["n", "text"]).unwrap();
        for cell in &flat {
            csv.write_record(["7", cell.unwrap_or("")]).unwrap();
        }
        let mut exact = columnar(&batch);
        exact.push(("rows.jsonl", (objects.join("\n") + "\n").into_bytes()));
        exact.push(("rows.json", format!("[{}]", objects.join(",\n ")).into_bytes()));
        // These two formats have no null: it becomes an empty string.
        let lines: Vec<&str> = flat.iter().map(|cell| cell.unwrap_or("")).collect();
        let plain = [
            ("rows.csv", csv.into_inner().unwrap()),
            ("rows.txt", (lines.join("\n") + "\n").into_bytes()),
        ];

        let settings = settings(Rendering::Template(Template::column("text")), first, dedupe, all);
        let (name, bytes) = &exact[0];
        let expected = drawn(name, bytes, &settings);
        let counts = |m: &Manifest| (m.row_count, m.available_tokens, m.unique_tokens);
        for (name, bytes) in exact.iter().chain(&plain) {
            let found = drawn(name, bytes, &settings);
            prop_assert_eq!(found.is_some(), expected.is_some(), "{}", name);
            let (Some((windows, manifest)), Some((right, of))) = (found, &expected) else { continue };
            prop_assert_eq!(&windows, right, "{}", name);
            prop_assert_eq!(counts(&manifest), counts(of), "{}", name);
            let left_out = |m: &Manifest| m.null_rows + m.blank_rows;
            prop_assert_eq!(left_out(&manifest), left_out(of), "{}", name);
            if exact.iter().any(|(other, _)| other == name) {
                prop_assert_eq!(manifest.null_rows, of.null_rows, "{}", name);
            }
            if name.contains("json") && !dedupe {
                let cut = flat.iter().skip(first).flatten();
                let cut = cut.filter(|text| text.contains('\u{fffd}')).count();
                prop_assert_eq!(manifest.mended_rows, cut, "{}", name);
            }
        }
    }

    #[test]
    fn token_ids_are_the_same_windows_in_every_format(
        rows in prop::collection::vec(prop::collection::vec((1u32..4096, any::<bool>()), 0..20), 1..12),
        has_mask in any::<bool>(), first in 0usize..2,
    ) {
        let list = |pick: &dyn Fn(&(u32, bool)) -> i64| -> ArrayRef {
            let rows = rows.iter().map(|row| Some(row.iter().map(|id| Some(pick(id))).collect::<Vec<_>>()));
            Arc::new(ListArray::from_iter_primitive::<Int64Type, _, _>(rows))
        };
        let mut columns = vec![("input_ids", list(&|id| id.0.into()))];
        if has_mask {
            columns.push(("attention_mask", list(&|id| id.1.into())));
        }
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let object = |row: &Vec<(u32, bool)>| {
            let ids: Vec<u32> = row.iter().map(|id| id.0).collect();
            let mask: Vec<u8> = row.iter().map(|id| id.1.into()).collect();
            match has_mask {
                true => json!({"input_ids": ids, "attention_mask": mask}),
                false => json!({"input_ids": ids}),
            }
            .to_string()
        };
        let objects: Vec<String> = rows.iter().map(object).collect();
        let mut files = columnar(&batch);
        files.push(("rows.jsonl", objects.join("\n").into_bytes()));
        files.push(("rows.json", format!("[{}]", objects.join(",")).into_bytes()));

        let kept = |row: &Vec<(u32, bool)>| -> Vec<u32> {
            row.iter().filter(|id| id.1 || !has_mask).map(|id| id.0).collect()
        };
        let used: Vec<Vec<u32>> = rows.iter().skip(first).map(kept).collect();
        let joined = used.concat();
        let column = "input_ids".into();
        let settings = settings(Rendering::Tokens { column }, first, false, false);
        for (name, bytes) in &files {
            match drawn(name, bytes, &settings) {
                Some((windows, manifest)) => {
                    prop_assert_eq!(windows.concat(), &joined[..16], "{}", name);
                    prop_assert_eq!(manifest.available_tokens, joined.len());
                    prop_assert_eq!(manifest.blank_rows, used.iter().filter(|row| row.is_empty()).count());
                    let all = rows.iter().skip(first).map(Vec::len).sum::<usize>();
                    prop_assert_eq!(manifest.masked_tokens, all - joined.len());
                }
                None => prop_assert!(joined.len() < 16, "{}", name),
            }
        }
    }
}
