//! The same rows give the same windows in every format and compression; broken files are refused.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use arrow::ipc::writer::{FileWriter, StreamWriter};
use parquet::arrow::ArrowWriter;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::Template;
use crate::{OnError, Rendering, RowRange, Source};

fn root(path: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../..", path].iter().collect()
}

fn tokenizer() -> TextTokenizer {
    TextTokenizer::load(&root("tests/models/medi-tiny")).unwrap()
}

fn settings(path: &Path, template: &str) -> CalibrationSettings {
    CalibrationSettings {
        source: Source::Local(path.into()),
        rendering: Rendering::Template(Template::parse(template).unwrap()),
        rows: "3:".parse().unwrap(),
        min_tokens: 0,
        dedupe: false,
        on_error: OnError::Stop,
        date: None,
        samples: 5,
        seq_len: 100,
        seed: 11,
        sampling: Sampling::RandomWindows,
    }
}

/// Returns `(input, output)` of 40 rows, with quotes, commas, line breaks and non-ASCII letters.
fn rows() -> Vec<(String, String)> {
    (0..40)
        .map(|i| {
            (
                format!("What is \"fever\", no. {i}?"),
                format!("Température of {i} °C,\nand more, \\ and {{so}} on."),
            )
        })
        .collect()
}

fn json_rows() -> Vec<serde_json::Value> {
    let rows = rows().into_iter();
    rows.map(|(input, output)| serde_json::json!({"id": 1, "input": input, "output": output}))
        .collect()
}

fn batch(rows: &[(String, String)]) -> RecordBatch {
    let column = |text: fn(&(String, String)) -> &String| {
        Arc::new(StringArray::from_iter_values(rows.iter().map(text)))
    };
    let fields = ["unused", "input", "output"].map(|n| Field::new(n, DataType::Utf8, true));
    let schema = Arc::new(Schema::new(fields.to_vec()));
    let columns: Vec<arrow::array::ArrayRef> =
        vec![column(|r| &r.0), column(|r| &r.0), column(|r| &r.1)];
    RecordBatch::try_new(schema, columns).unwrap()
}

/// Returns the file name and bytes for every format.
fn files() -> Vec<(&'static str, Vec<u8>)> {
    let rows = rows();
    let list = serde_json::to_vec(&json_rows()).unwrap();
    let object = serde_json::json!({"version": 1, "about": {"tags": ["a"]}, "data": json_rows()});
    let lines: Vec<String> = json_rows().iter().map(|row| row.to_string()).collect();
    let mut csv = csv::Writer::from_writer(Vec::new());
    csv.write_record(["input", "id", "output"]).unwrap();
    for (input, output) in &rows {
        csv.write_record([input, "7", output]).unwrap();
    }
    let batches = [batch(&rows[..25]), batch(&rows[25..])];
    let schema = batches[0].schema();
    let mut parquet = ArrowWriter::try_new(Vec::new(), schema.clone(), None).unwrap();
    let mut stream = StreamWriter::try_new(Vec::new(), &schema).unwrap();
    let mut file = FileWriter::try_new(Vec::new(), &schema).unwrap();
    for batch in &batches {
        parquet.write(batch).unwrap();
        stream.write(batch).unwrap();
        file.write(batch).unwrap();
    }
    vec![
        ("list.json", list),
        ("object.json", serde_json::to_vec_pretty(&object).unwrap()),
        ("rows.jsonl", (lines.join("\r\n") + "\n\n").into_bytes()),
        ("rows.csv", csv.into_inner().unwrap()),
        ("rows.parquet", parquet.into_inner().unwrap()),
        ("stream.arrow", stream.into_inner().unwrap()),
        ("file.arrow", file.into_inner().unwrap()),
        // As C4 is published, and as jq prints it.
        ("lines.json", lines.join("\n").into_bytes()),
        (
            "marked.json",
            format!("\u{feff}{}\r\n", lines.join("\r\n")).into_bytes(),
        ),
        (
            "pretty.json",
            json_rows()
                .iter()
                .map(|row| format!("{row:#}\n"))
                .collect::<String>()
                .into_bytes(),
        ),
    ]
}

/// Writes `bytes` as they are, gzipped and as zstd.
fn write_all(dir: &TempDir, name: &str, bytes: &[u8]) -> [PathBuf; 3] {
    let path = |ending: &str| dir.path().join(format!("{name}{ending}"));
    fs::write(path(""), bytes).unwrap();
    let file = File::create(path(".gz")).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap();
    fs::write(path(".zst"), zstd::encode_all(bytes, 1).unwrap()).unwrap();
    [path(""), path(".gz"), path(".zst")]
}

#[test]
fn every_format_and_compression_gives_the_same_windows() {
    let tokenizer = tokenizer();
    let dir = TempDir::new().unwrap();
    let mut expected: Option<Vec<Vec<u32>>> = None;
    for (name, bytes) in files() {
        for path in write_all(&dir, name, &bytes) {
            let drawn = Calibration::draw(&settings(&path, "{input}\n{output}"), &tokenizer);
            let drawn = drawn.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            assert_eq!(drawn.manifest.row_count, 37, "{}", path.display());
            let expected = expected.get_or_insert(drawn.windows.clone());
            assert_eq!(&drawn.windows, expected, "{}", path.display());
        }
    }
}

/// Returns the column `messages` of every row.
fn talks(path: &Path) -> Vec<crate::Value> {
    let file = &Source::Local(path.into()).files().unwrap()[0];
    let mut talks = Vec::new();
    let _ = crate::reader::read(file, &crate::row::Reading::of(&[]), &mut |row| {
        talks.push(row.get("messages").cloned().unwrap_or_default());
        Ok(std::ops::ControlFlow::Continue(()))
    })
    .unwrap_or_else(|e| panic!("{e}"));
    talks
}

#[test]
fn a_json_file_of_objects_that_hold_lists_has_a_row_for_each_and_one_object_has_its_list() {
    let dir = TempDir::new().unwrap();
    let row =
        |i: usize| serde_json::json!({"id": "} {\"", "messages": [{"n": i}, "]\\"], "tags": [1]});
    // Rows longer than the piece that is read at once, together larger than one row may be.
    let long = |i: usize| serde_json::json!({"messages": [i], "text": "x".repeat(3 << 20)});
    for (name, rows) in [
        ("short.json", (0..5).map(row).collect::<Vec<_>>()),
        ("long.json", (0..7).map(long).collect()),
    ] {
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        let expected: Vec<_> = rows.iter().map(|row| row["messages"].clone()).collect();
        for path in write_all(&dir, name, lines.as_bytes()) {
            assert_eq!(talks(&path), expected, "{}", path.display());
        }
    }
    // A single object over the limit of a row is still read: the elements of its list are the rows.
    let one = serde_json::json!({"about": {"n": 1}, "data": (0..7).map(long).collect::<Vec<_>>()});
    for path in write_all(&dir, "one.json", one.to_string().as_bytes()) {
        assert_eq!(talks(&path).len(), 7, "{}", path.display());
    }
}

#[test]
fn lines_of_text_are_the_rows_of_a_list_of_texts() {
    let tokenizer = tokenizer();
    let dir = TempDir::new().unwrap();
    let lines: Vec<String> = (0..60).map(|i| format!("Line {i} of a text.")).collect();
    let list = dir.path().join("list.json");
    fs::write(&list, serde_json::to_string(&lines).unwrap()).unwrap();
    let draw = |path: &Path| Calibration::draw(&settings(path, "{text}"), &tokenizer).unwrap();
    let expected = draw(&list).windows;
    for path in write_all(&dir, "lines.txt", lines.join("\n").as_bytes()) {
        assert_eq!(draw(&path).windows, expected, "{}", path.display());
    }
}

#[test]
fn files_of_a_glob_are_one_after_the_other() {
    let tokenizer = tokenizer();
    let dir = TempDir::new().unwrap();
    let (head, tail) = (json_rows()[..15].to_vec(), json_rows()[15..].to_vec());
    let whole = dir.path().join("whole.json");
    fs::write(&whole, serde_json::to_vec(&json_rows()).unwrap()).unwrap();
    for (name, rows) in [("part-0.json", head), ("part-1.json", tail)] {
        fs::write(dir.path().join(name), serde_json::to_vec(&rows).unwrap()).unwrap();
    }
    let draw = |name: &str| {
        let settings = settings(&dir.path().join(name), "{input}\n{output}");
        Calibration::draw(&settings, &tokenizer).unwrap()
    };
    let (parts, whole) = (draw("part-*.json"), draw("whole.json"));
    assert_eq!(parts.windows, whole.windows);
    let names: Vec<&str> = parts
        .manifest
        .files
        .iter()
        .map(|f| f.name.as_str())
        .collect();
    assert_eq!(names, ["part-0.json", "part-1.json"]);
    assert_eq!(parts.manifest.source, "part-*.json");
}

fn refusal(path: &Path) -> String {
    let settings = settings(path, "{input}\n{output}");
    let error = Calibration::draw(&settings, &tokenizer())
        .unwrap_err()
        .to_string();
    assert!(!error.contains('\n'), "one line: {error}");
    error
}

#[test]
fn a_bomb_is_refused_when_one_row_grows_too_long() {
    let dir = TempDir::new().unwrap();
    let blank = vec![b' '; 1 << 20];
    for (name, start) in [
        ("a.json.gz", "[{\"input\": \""),
        ("a2.json.gz", "{\"input\": \""),
        ("a3.json.gz", "{}"),
        ("a.jsonl.gz", "{\"input\": \""),
        ("a.csv.gz", "input,output\n\""),
        ("a.txt.gz", ""),
    ] {
        let path = dir.path().join(name);
        let file = File::create(&path).unwrap();
        let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        gzip.write_all(start.as_bytes()).unwrap();
        for _ in 0..80 {
            gzip.write_all(&blank).unwrap();
        }
        gzip.finish().unwrap();
        assert!(fs::metadata(&path).unwrap().len() < 1 << 20, "a small file");
        let error = refusal(&path);
        assert!(error.contains(name) && error.contains("16 MiB"), "{error}");
    }
}

#[test]
fn a_parquet_file_with_a_lying_row_count_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("lying.parquet");
    let (_, bytes) = files().into_iter().find(|f| f.0 == "rows.parquet").unwrap();
    // The footer: Thrift compact, where a count of 40 rows is the field 0x16 with zigzag 80.
    let footer = bytes.len()
        - 8
        - u32::from_le_bytes(bytes[bytes.len() - 8..][..4].try_into().unwrap()) as usize;
    let counts: Vec<usize> = (footer..bytes.len() - 8)
        .filter(|&at| bytes[at..at + 2] == [0x16, 80])
        .collect();
    assert!(counts.len() >= 2, "of the file and of its row group");
    for at in counts {
        let mut lying = bytes.clone();
        lying[at + 1] = 120; // 60 rows
        fs::write(&path, lying).unwrap();
        let error = refusal(&path);
        assert!(error.contains("lying.parquet"), "{error}");
    }
}

#[test]
fn an_arrow_file_whose_footer_lies_about_a_length_is_refused_before_memory_is_taken() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("lying.arrow");
    let (_, bytes) = files().into_iter().find(|f| f.0 == "file.arrow").unwrap();
    let tail = bytes.len() - 10;
    let length = u32::from_le_bytes(bytes[tail..tail + 4].try_into().unwrap()) as usize;
    let mut footer = bytes.clone();
    footer[tail..tail + 4].copy_from_slice(&0x7fff_0000u32.to_le_bytes());
    fs::write(&path, footer).unwrap();
    let error = refusal(&path);
    assert!(error.contains("footer of 2147418112 bytes"), "{error}");

    // A batch's block: its offset, the length of its metadata, and of its body.
    let body: Vec<usize> = (tail - length..tail - 8)
        .filter(|&at| {
            let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
            (8..bytes.len() as u64).contains(&long(at)) && long(at) % 8 == 0 && long(at) > 1000
        })
        .collect();
    assert!(!body.is_empty(), "no block found");
    let mut refused = 0;
    for at in body {
        let mut lying = bytes.clone();
        lying[at..at + 8].copy_from_slice(&(1u64 << 40).to_le_bytes());
        fs::write(&path, lying).unwrap();
        refused += usize::from(refusal(&path).contains("outside the file"));
    }
    assert!(refused >= 2, "both blocks' bodies, or their offsets");
}

#[test]
fn broken_and_unknown_files_are_refused_by_name() {
    let dir = TempDir::new().unwrap();
    for (name, text, words) in [
        ("a.json", "[{\"input\": 1}", "row 1: "),
        ("b.json", "{\"a\": 1}", "without a list"),
        ("c.json", "{\"a\": [], \"b\": []}", "more than one list"),
        ("d.json", "[1]", "neither an object nor a text"),
        (
            "d2.json",
            "{\"input\": \"a\", \"output\": \"b\"}\n{\"input\": ",
            "row 1: ",
        ),
        (
            "d3.json",
            "{\"input\": \"a\", \"output\": \"b\"}\n7",
            "neither an object nor a text",
        ),
        ("d4.json", "[\"a\"]\n[\"b\"]", "row 1: "),
        ("e.jsonl", "{\"input\": \"a\"", "line 1"),
        ("f.csv", "a,b\n1\n", "f.csv"),
        ("f2.csv", &",".repeat(5000), "5001 columns"),
        ("g.txt", "\u{fffd}", "its columns are text"),
        ("h.parquet", "PAR1", "h.parquet"),
        ("i.arrow", "ARROW1", "i.arrow"),
        ("j.arrow", "nonsense", "j.arrow"),
        ("k.json.gz", "not gzip", "k.json.gz"),
        ("l.jsonl.zst", "not zstd", "l.jsonl.zst"),
        ("m.xlsx", "", "supported are"),
        ("n.json", "", "n.json"),
    ] {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        let settings = CalibrationSettings {
            rows: RowRange::default(),
            ..settings(&path, "{input}\n{output}")
        };
        let error = Calibration::draw(&settings, &tokenizer())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(words) && !error.contains('\n'),
            "{name}: {error}"
        );
    }
    let missing = refusal(&dir.path().join("none.json"));
    assert!(missing.contains("none.json"), "{missing}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Damaged files are read or refused: nothing panics, and no declared size is trusted.
    #[test]
    fn damaged_columnar_files_are_read_or_refused(
        which in 4usize..7, at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>()
    ) {
        let (name, mut bytes) = files().swap_remove(which);
        let at = at.index(bytes.len());
        match cut {
            true => bytes.truncate(at),
            false => bytes[at] = byte,
        }
        let dir = TempDir::new().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let file = &Source::Local(path).files().unwrap()[0];
        let mut rows = 0;
        let read = crate::reader::read(file, &crate::row::Reading::of(&["input"]), &mut |_| {
            rows += 1;
            Ok(std::ops::ControlFlow::Continue(()))
        });
        prop_assert!(read.is_err() || rows <= 1000, "{rows} rows");
    }
}
