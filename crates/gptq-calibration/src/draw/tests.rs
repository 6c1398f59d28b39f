//! Drawn windows, and refused settings.

use std::path::PathBuf;

use super::*;
use crate::Template;
use crate::{OnError, Rendering, RowRange, Source};

fn root(path: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../..", path].iter().collect()
}

pub(super) fn settings(sampling: Sampling) -> CalibrationSettings {
    CalibrationSettings {
        source: Source::Local(root(
            "calibration/wikidoc/wikidoc_patient_information_1000.json",
        )),
        rendering: Rendering::Template(Template::parse("{input}\n{output}").unwrap()),
        rows: "0:50".parse().unwrap(),
        min_tokens: 0,
        dedupe: false,
        on_error: OnError::Stop,
        date: None,
        samples: 4,
        seq_len: 512,
        seed: 3,
        sampling,
    }
}

pub(super) fn tokenizer() -> TextTokenizer {
    TextTokenizer::load(&root("tests/models/medi-tiny")).unwrap()
}

#[test]
fn concatenated_windows_are_the_text_from_its_start() {
    let tokenizer = tokenizer();
    let drawn = Calibration::draw(&settings(Sampling::Concatenate), &tokenizer).unwrap();
    assert_eq!(drawn.windows.len(), 4);
    assert_eq!(drawn.windows[0][0], 1, "the tokenizer's own <s> leads");
    assert!(
        drawn.windows.concat().contains(&2),
        "documents end with </s>"
    );
    assert_eq!(drawn.manifest.unique_tokens, 4 * 512);
    assert_eq!(drawn.manifest.row_count, 50);
}

#[test]
fn a_seed_gives_the_same_windows_and_another_seed_others() {
    let tokenizer = tokenizer();
    let draw = |seed| {
        let settings = CalibrationSettings {
            seed,
            ..settings(Sampling::RandomWindows)
        };
        Calibration::draw(&settings, &tokenizer).unwrap().windows
    };
    assert_eq!(draw(3), draw(3));
    assert_ne!(draw(3), draw(4));
    assert!(draw(3).iter().all(|w| w.len() == 512));
}

#[test]
fn too_little_text_says_what_would_fit() {
    let tokenizer = tokenizer();
    let settings = CalibrationSettings {
        samples: 1000,
        ..settings(Sampling::Concatenate)
    };
    let error = Calibration::draw(&settings, &tokenizer).unwrap_err();
    let CalibrationError::TooLittleText {
        available,
        needed,
        fit,
        fit_len,
        ..
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!(needed, 512_000);
    assert_eq!((fit, fit_len), (available / 512, available / 1000));
    let rows = CalibrationSettings {
        rows: "5000:".parse().unwrap(),
        ..settings
    };
    assert!(matches!(
        Calibration::draw(&rows, &tokenizer),
        Err(CalibrationError::NoRows {
            available: 1000,
            ..
        })
    ));
}

#[test]
fn covered_positions_are_counted_once() {
    assert_eq!(covered(vec![0, 10, 3], 5), 13);
    assert_eq!(covered(vec![4, 4], 5), 5);
}

#[test]
fn short_and_repeated_rows_are_left_out_when_asked_for() {
    let tokenizer = tokenizer();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.json");
    let long = "A cold is a mild infection of the nose and throat. ".repeat(8);
    let rows = ["Hi", &long, "Yes", &long, &long];
    std::fs::write(&path, serde_json::to_string(&rows).unwrap()).unwrap();
    let draw = |min_tokens, dedupe| {
        let settings = CalibrationSettings {
            source: Source::Local(path.clone()),
            rendering: Rendering::Template(Template::column("text")),
            rows: RowRange::default(),
            min_tokens,
            dedupe,
            samples: 1,
            seq_len: 32,
            ..settings(Sampling::RandomWindows)
        };
        let manifest = Calibration::draw(&settings, &tokenizer).unwrap().manifest;
        (manifest.row_count, manifest.available_tokens)
    };
    let (all, tokens) = draw(0, false);
    assert_eq!(all, 5);
    assert_eq!(draw(20, false).0, 3);
    assert_eq!(draw(0, true).0, 3);
    let (one, fewer) = draw(20, true);
    assert_eq!(one, 1);
    assert!(
        3 * fewer < tokens && tokens < 4 * fewer,
        "{fewer} of {tokens}"
    );
}

#[test]
fn rows_with_a_null_are_left_out_and_counted() {
    let tokenizer = tokenizer();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let texts: Vec<String> = (0..600)
        .map(|i| format!("Row {i} says that a cold is mild."))
        .collect();
    let write = |every: usize| {
        let mut lines = String::new();
        for (i, text) in texts.iter().enumerate() {
            let row = serde_json::json!({"text": text, "other": i});
            lines += &format!("{row}\n");
            if i % every == 0 {
                lines += "{\"text\": null, \"other\": null}\n";
            }
        }
        std::fs::write(&path, lines).unwrap();
    };
    let wikidoc = settings(Sampling::RandomWindows);
    let settings = |sampling, text: &str| CalibrationSettings {
        source: Source::Local(path.clone()),
        rendering: Rendering::Template(Template::parse(text).unwrap()),
        rows: RowRange::default(),
        samples: 2,
        seq_len: 128,
        ..settings(sampling)
    };
    let draw = |sampling, text| Calibration::draw(&settings(sampling, text), &tokenizer);
    write(usize::MAX);
    let (whole, window) = (Sampling::RandomWindows, Sampling::Concatenate);
    let without = draw(whole, "{text}").unwrap();
    assert_eq!(without.manifest.null_rows, 1, "row 0 has one after it");
    write(2);
    let with = draw(whole, "{text}").unwrap();
    assert_eq!(with.windows, without.windows);
    assert_eq!(
        (with.manifest.row_count, with.manifest.null_rows),
        (600, 300)
    );
    // With consecutive windows, rows are counted up to the batch that fills them, however far the
    // reader is.
    for _ in 0..3 {
        let manifest = draw(window, "{text}").unwrap().manifest;
        assert_eq!((manifest.row_count, manifest.null_rows), (256, 128));
    }

    let json = serde_json::to_value(&with.manifest).unwrap();
    assert_eq!(json["null_rows"], 300);
    let wikidoc = Calibration::draw(&wikidoc, &tokenizer).unwrap();
    let json = serde_json::to_string(&wikidoc.manifest).unwrap();
    assert!(!json.contains("null_rows"), "as it was before: {json}");
    assert_eq!(
        serde_json::from_str::<Manifest>(&json).unwrap(),
        wikidoc.manifest
    );

    let none = "{\"text\": null, \"title\": \"a\"}\n".repeat(3);
    std::fs::write(&path, none).unwrap();
    let error = draw(whole, "{text}").unwrap_err().to_string();
    for word in ["all 3 rows", "null in \"text\"", "text, title"] {
        assert!(error.contains(word), "{word}: {error}");
    }
}

#[test]
fn a_columnar_file_of_nulls_names_the_columns_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let nulls: arrow::array::ArrayRef = std::sync::Arc::new(arrow::array::StringArray::new_null(5));
    let columns = [("text", nulls.clone()), ("title", nulls)];
    let batch = arrow::array::RecordBatch::try_from_iter(columns).unwrap();
    let mut parquet =
        parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
    parquet.write(&batch).unwrap();
    let mut stream =
        arrow::ipc::writer::StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
    stream.write(&batch).unwrap();
    let mut file = arrow::ipc::writer::FileWriter::try_new(Vec::new(), &batch.schema()).unwrap();
    file.write(&batch).unwrap();
    for (name, bytes) in [
        ("rows.parquet", parquet.into_inner().unwrap()),
        ("stream.arrow", stream.into_inner().unwrap()),
        ("file.arrow", file.into_inner().unwrap()),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        for (text, words) in [
            ("{text}", ["all 5 rows", "null in \"text\"", "text, title"]),
            ("{body}", [name, "no column \"body\"", "text, title"]),
        ] {
            let settings = CalibrationSettings {
                source: Source::Local(path.clone()),
                rendering: Rendering::Template(Template::parse(text).unwrap()),
                rows: RowRange::default(),
                ..settings(Sampling::RandomWindows)
            };
            let error = Calibration::draw(&settings, &tokenizer())
                .unwrap_err()
                .to_string();
            for word in words {
                assert!(error.contains(word), "{word}: {error}");
            }
        }
    }
}

#[test]
fn consecutive_windows_stop_reading_once_they_are_full() {
    let tokenizer = tokenizer();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let mut text = String::new();
    for i in 0..5000 {
        text += &format!("{{\"text\": \"Row {i} says that a cold is mild.\"}}\n");
    }
    // Rows that are not reached are not parsed.
    text += "{broken\n";
    std::fs::write(&path, text).unwrap();
    let settings = |sampling| CalibrationSettings {
        source: Source::Local(path.clone()),
        rendering: Rendering::Template(Template::column("text")),
        rows: RowRange::default(),
        samples: 2,
        seq_len: 128,
        ..settings(sampling)
    };
    let drawn = Calibration::draw(&settings(Sampling::Concatenate), &tokenizer).unwrap();
    assert_eq!(drawn.manifest.row_count, 256, "one batch");
    assert!(drawn.manifest.available_tokens >= 256);
    let error = Calibration::draw(&settings(Sampling::RandomWindows), &tokenizer).unwrap_err();
    assert!(error.to_string().contains("line 5001"), "{error}");
}

#[test]
fn rows_that_are_token_ids_are_taken_as_they_are() {
    let tokenizer = tokenizer();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    std::fs::write(
        &path,
        "{\"input_ids\": [5, 6, 7]}\n{\"input_ids\": [8, 9]}\n",
    )
    .unwrap();
    let settings = CalibrationSettings {
        source: Source::Local(path),
        rendering: Rendering::Tokens {
            column: "input_ids".into(),
        },
        rows: RowRange::default(),
        samples: 2,
        seq_len: 2,
        ..settings(Sampling::Concatenate)
    };
    let drawn = Calibration::draw(&settings, &tokenizer).unwrap();
    assert_eq!(drawn.windows, [[5, 6], [7, 8]]);
    assert_eq!(drawn.manifest.template, "token ids in input_ids");
}

#[test]
fn conversations_are_written_with_the_asked_for_template() {
    let tokenizer = tokenizer();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.json");
    let talk = serde_json::json!([
        {"talk": [{"role": "user", "content": "What is a cold?"}, {"role": "assistant", "content": "Mild."}]}
    ]);
    std::fs::write(&path, talk.to_string()).unwrap();
    let settings = |chatml| CalibrationSettings {
        source: Source::Local(path.clone()),
        rendering: Rendering::Messages {
            column: "talk".into(),
            chatml,
        },
        rows: RowRange::default(),
        samples: 1,
        seq_len: 12,
        ..settings(Sampling::Concatenate)
    };
    let drawn = Calibration::draw(&settings(true), &tokenizer).unwrap();
    let text = tokenizer.decode(&drawn.windows[0]).unwrap();
    assert!(text.contains("<|im_start|>user"), "{text}");
    // medi-tiny's tokenizer has no template of its own.
    let error = Calibration::draw(&settings(false), &tokenizer).unwrap_err();
    assert!(error.to_string().contains("chatml"), "{error}");
}
