//! Text to measure perplexity on.
//!
//! | file | documents |
//! |---|---|
//! | `.json`, `.jsonl`, `.csv`, `.parquet`, `.arrow` | each row's column `text`; in JSON, an element that is a text |
//! | `.txt`, and whatever has none of these endings, such as `.md` | the whole file is one |
//!
//! The first row's kinds may be compressed (`.gz`, `.zst`), and so may `.txt`.

use std::fs::File;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;

use serde_json::Value;

use crate::reader::{self, TEXT};
use crate::source::{Compression, Format, SourceFile, format};
use crate::{CalibrationError, TextTokenizer};

/// Most bytes of text, as decompressed: some 16 million tokens, where measurements take a million at most.
const MAX_TEXT: u64 = 64 << 20;

/// The joined tokens of an evaluation text, whose documents its format says.
///
/// # Errors
/// A file that cannot be read, is malformed, has rows without a text in the column `text`, holds over 64 MiB
/// of text, or too little to fill a window.
pub fn evaluation_tokens(
    path: &Path,
    tokenizer: &TextTokenizer,
    window: usize,
) -> Result<Vec<u32>, CalibrationError> {
    let tokens = tokenizer.join(read_texts(path)?)?;
    if tokens.len() < window {
        return Err(CalibrationError::TooLittleEvaluation {
            available: tokens.len(),
            window,
        });
    }
    Ok(tokens)
}

/// Documents for evaluation.
fn read_texts(path: &Path) -> Result<Vec<String>, CalibrationError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let (format, compression) = format(&name).unwrap_or((Format::Text, Compression::None));
    let file = SourceFile {
        name: name.into_owned(),
        path: path.into(),
        format,
        compression,
    };
    match format {
        Format::Text => plain(&file, MAX_TEXT).map(|text| vec![text]),
        _ => column(&file, MAX_TEXT),
    }
}

/// The whole file.
fn plain(file: &SourceFile, limit: u64) -> Result<String, CalibrationError> {
    let opened = File::open(&file.path).map_err(CalibrationError::io(&file.path))?;
    let mut bytes = Vec::new();
    reader::decompress(opened, file)?
        .take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(CalibrationError::io(&file.path))?;
    within(bytes.len() as u64, limit, file)?;
    String::from_utf8(bytes).map_err(|_| {
        let reason = "not UTF-8 text; a compressed text is named like .txt.gz or .txt.zst";
        reader::malformed(file, reason)
    })
}

/// The texts in the column `text`.
fn column(file: &SourceFile, limit: u64) -> Result<Vec<String>, CalibrationError> {
    let mut texts = Vec::new();
    let mut bytes = 0;
    let lacks = |columns: Vec<String>| CalibrationError::EvaluationColumn {
        path: file.path.clone(),
        columns,
    };
    let read = reader::read(file, &[TEXT], &mut |mut row| {
        match row.remove(TEXT) {
            Some(Value::String(text)) => {
                bytes += text.len() as u64;
                within(bytes, limit, file)?;
                texts.push(text);
            }
            Some(_) => {
                let reason = format!("row {}: {TEXT:?} is not a text", texts.len());
                return Err(reader::malformed(file, reason));
            }
            None => return Err(lacks(row.keys().cloned().collect())),
        }
        Ok(ControlFlow::Continue(()))
    });
    match read {
        Ok(_) => Ok(texts),
        Err(error) => {
            let found: &CalibrationError = match &error {
                CalibrationError::InFile { source, .. } => source,
                other => other,
            };
            // What a file that is stored by columns says at once.
            let columns = match found {
                CalibrationError::Column { columns, .. } => Some(columns.clone()),
                _ => None,
            };
            Err(columns.map_or(error, lacks))
        }
    }
}

fn within(bytes: u64, limit: u64, file: &SourceFile) -> Result<(), CalibrationError> {
    match bytes > limit {
        true => Err(reader::malformed(
            file,
            format!("over the limit of {limit} bytes for an evaluation text; take a part of it"),
        )),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
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

    /// A JSON object a line.
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
            assert_eq!(read_texts(&path).unwrap(), TEXTS, "{name}");
        }
    }

    #[test]
    fn a_plain_text_is_one_whatever_it_looks_like() {
        let dir = TempDir::new().unwrap();
        let text = "First line.\n\n[\"second\"]\n";
        for name in ["a.txt", "a.md", "a", "a.TXT", "a.log"] {
            let path = put(&dir, name, text.as_bytes());
            assert_eq!(read_texts(&path).unwrap(), [text], "{name}");
        }
        let path = put(&dir, "a.txt.gz", &gzip(text.as_bytes()));
        assert_eq!(read_texts(&path).unwrap(), [text]);
        let path = put(&dir, "a.gz", &gzip(text.as_bytes()));
        let line = read_texts(&path).unwrap_err().to_string();
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
            let line = read_texts(&path).unwrap_err().to_string();
            for word in [name, "no column \"text\"", "input", "rename"] {
                assert!(line.contains(word), "no {word:?} in: {line}");
            }
        }
        let path = put(&dir, "rows.json", br#"[{"text": "a"}, {"text": 7}]"#);
        let line = read_texts(&path).unwrap_err().to_string();
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
            format: Format::Text,
            compression: Compression::Gzip,
        };
        assert_eq!(plain(&file, 1000).unwrap().len(), 1000);
        let line = plain(&file, 999).unwrap_err().to_string();
        assert!(line.contains("limit of 999 bytes"), "{line}");
        let rows = SourceFile {
            path: put(&dir, "rows.jsonl", &lines("text")),
            format: Format::JsonLines,
            compression: Compression::None,
            ..file
        };
        let all = TEXTS.map(str::len).iter().sum::<usize>() as u64;
        assert_eq!(column(&rows, all).unwrap(), TEXTS);
        assert!(column(&rows, all - 1).is_err());
    }
}
