//! Evaluation texts in every format: skipped parts and refusals.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use tempfile::TempDir;

use super::*;

const TEXTS: [&str; 3] = ["Fever, \"high\".", "Température\nof 40 °C", "{\"text\": 1}"];

fn put(dir: &TempDir, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn parquet(column: &str) -> Vec<u8> {
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(TEXTS));
    let batch = RecordBatch::try_from_iter([(column, texts)]).unwrap();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

/// Writes one JSON object per line.
fn lines(column: &str) -> Vec<u8> {
    let row = |text: &&str| format!("{}\n", serde_json::json!({ column: text, "id": 7 }));
    TEXTS.iter().map(row).collect::<String>().into()
}

#[test]
fn rows_in_every_format_are_the_same_texts() {
    let dir = TempDir::new().unwrap();
    let list = serde_json::to_vec(&TEXTS).unwrap();
    let objects = TEXTS.map(|text| serde_json::json!({"text": text, "id": 7}));
    let objects = serde_json::to_vec(&objects).unwrap();
    let csv = "id,text\n7,\"Fever, \"\"high\"\".\"\n7,\"Température\nof 40 °C\"\n7,\"{\"\"text\"\": 1}\"\n";
    for (name, bytes) in [
        ("list.json", list.clone()),
        ("list.json.gz", gzip(&list)),
        ("objects.json", objects),
        ("rows.jsonl", lines("text")),
        (
            "rows.jsonl.zst",
            zstd::encode_all(&lines("text")[..], 0).unwrap(),
        ),
        ("rows.csv", csv.into()),
        ("rows.parquet", parquet("text")),
        ("rows.parquet.gz", gzip(&parquet("text"))),
    ] {
        let path = put(&dir, name, &bytes);
        assert_eq!(read_texts(&path, u64::MAX).unwrap().texts, TEXTS, "{name}");
    }
}

#[test]
fn a_plain_text_is_one_whatever_it_looks_like() {
    let dir = TempDir::new().unwrap();
    let text = "First line.\n\n[\"second\"]\n";
    for name in ["a.txt", "a.md", "a", "a.TXT", "a.log"] {
        let path = put(&dir, name, text.as_bytes());
        assert_eq!(read_texts(&path, u64::MAX).unwrap().texts, [text], "{name}");
    }
    let path = put(&dir, "a.txt.gz", &gzip(text.as_bytes()));
    assert_eq!(read_texts(&path, u64::MAX).unwrap().texts, [text]);
    let path = put(&dir, "a.gz", &gzip(text.as_bytes()));
    let line = read_texts(&path, u64::MAX).unwrap_err().to_string();
    assert!(
        line.contains("a.gz: not UTF-8") && line.contains(".txt.gz"),
        "{line}"
    );
}

#[test]
fn rows_without_a_text_are_refused_by_name_with_what_they_have() {
    let dir = TempDir::new().unwrap();
    for (name, bytes) in [
        ("rows.jsonl", lines("input")),
        ("rows.parquet", parquet("input")),
        ("rows.csv", b"input\nx\n".to_vec()),
    ] {
        let path = put(&dir, name, &bytes);
        let line = read_texts(&path, u64::MAX).unwrap_err().to_string();
        for word in [name, "no column \"text\"", "input", "rename"] {
            assert!(line.contains(word), "no {word:?} in: {line}");
        }
    }
    let path = put(&dir, "rows.json", br#"[{"text": "a"}, {"text": 7}]"#);
    let line = read_texts(&path, u64::MAX).unwrap_err().to_string();
    assert!(
        line.contains("row 1") && line.contains("not a text"),
        "{line}"
    );
}

#[test]
fn more_text_than_the_limit_is_refused_as_it_is_unpacked() {
    let dir = TempDir::new().unwrap();
    let packed = gzip(&[b'a'; 1000]);
    let path = put(&dir, "a.txt.gz", &packed);
    let file = SourceFile {
        name: "a.txt.gz".into(),
        path,
        format: RowFormat::Text,
        compression: Compression::Gzip,
    };
    assert_eq!(plain(&file, 1000, u64::MAX).unwrap().texts[0].len(), 1000);
    let line = plain(&file, 999, u64::MAX).unwrap_err().to_string();
    assert!(line.contains("limit of 999 bytes"), "{line}");
    let rows = SourceFile {
        path: put(&dir, "rows.jsonl", &lines("text")),
        format: RowFormat::JsonLines,
        compression: Compression::None,
        ..file
    };
    let all = TEXTS.map(str::len).iter().sum::<usize>() as u64;
    assert_eq!(column(&rows, all, u64::MAX).unwrap().texts, TEXTS);
    assert!(column(&rows, all - 1, u64::MAX).is_err());
}

#[test]
fn rows_without_text_are_left_out_and_counted_in_every_format() {
    let dir = TempDir::new().unwrap();
    let cells: ArrayRef = Arc::new(StringArray::from(vec![
        Some(" \n"),
        Some("Fever."),
        None,
        Some(""),
        Some("cut \u{fffd}"),
    ]));
    let batch = RecordBatch::try_from_iter([("text", cells)]).unwrap();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    let lines = "{\"id\": 1}\n{\"text\": \"Fever.\", \"id\": NaN}\n{\"text\": null}\n{\"text\": \"\"}\n\
                 {\"text\": \"cut \\ud83d\"}\n";
    let list = "[\" \", \"Fever.\", {\"text\": null}, {\"text\": \"\\t\"}, \"cut \\udead\"]";
    for (name, bytes, mended) in [
        ("rows.parquet", writer.into_inner().unwrap(), 0),
        ("rows.jsonl", lines.into(), 1),
        ("rows.json", list.into(), 1),
        (
            "rows.csv",
            b"text\n\" \"\nFever.\n\"\"\n\"\"\ncut \xef\xbf\xbd\n".to_vec(),
            0,
        ),
    ] {
        let path = put(&dir, name, &bytes);
        let found = read_texts(&path, u64::MAX).unwrap();
        assert_eq!(found.texts, ["Fever.", "cut \u{fffd}"], "{name}");
        assert_eq!((found.left_out, found.mended), (3, mended), "{name}");
    }
    for (name, bytes) in [("a.jsonl", "{\"text\": \"\"}\n"), ("a.txt", " \n\n")] {
        let path = put(&dir, name, bytes.as_bytes());
        let line = read_texts(&path, u64::MAX).unwrap_err().to_string();
        assert!(line.contains(name) && line.contains("no text"), "{line}");
    }
}

#[test]
fn what_fills_no_window_is_counted_and_a_window_that_takes_it_in_is_named() {
    let text = |tokens: usize, window| EvaluationText {
        tokens: vec![5; tokens],
        window,
        documents: 1,
        rows_left_out: 0,
        mended: 0,
        is_whole: true,
    };
    let short = text(1832, 1024);
    assert_eq!(
        (short.scored(), short.left_over(), short.windows().count()),
        (1023, 808, 1)
    );
    let warning = short.left_over_warning().unwrap();
    for words in [
        "1023 of the evaluation text's 1832",
        "808 after the last full window",
        "--window 916",
        "score 1830",
    ] {
        assert!(warning.contains(words), "{words}: {warning}");
    }
    let fitting = text(1832, 916);
    assert_eq!((fitting.scored(), fitting.left_over()), (1830, 0));
    assert_eq!(fitting.left_over_warning(), None);
    assert_eq!(
        text(100_000, 1024).left_over_warning(),
        None,
        "under a twentieth"
    );
}

#[test]
fn a_text_shorter_than_a_window_is_refused_with_the_window_that_fits() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let tokenizer = TextTokenizer::load(&root.join("tests/models/medi-tiny")).unwrap();
    let dir = TempDir::new().unwrap();
    let path = put(&dir, "a.txt", b"Fever and cough.");
    let tokens = EvaluationText::read(&path, &tokenizer, 64)
        .unwrap()
        .tokens
        .len();
    for look in [evaluation_tokens, EvaluationText::first_look] {
        let line = look(&path, &tokenizer, 64).unwrap_err().to_string();
        assert!(
            line.contains("a.txt") && line.contains(&format!("--window {tokens}")),
            "{line}"
        );
        assert!(look(&path, &tokenizer, tokens).is_ok());
    }
    // A first look does not read a long text to its end.
    let path = put(&dir, "long.txt", "Fièvre. ".repeat(1 << 19).as_bytes());
    let look = EvaluationText::first_look(&path, &tokenizer, 64).unwrap();
    assert!(!look.is_whole && look.tokens.len() > 64);
}
