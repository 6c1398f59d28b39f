//! Skipped rows, refused rows, and the findings of a first look.

use super::tests::{settings, tokenizer};
use super::*;
use crate::Template;
use crate::{Rendering, RowRange, Source, first_look};

/// Returns settings for rows of `text` written as `name`.
fn of_file(
    dir: &tempfile::TempDir,
    name: &str,
    text: &str,
    rendering: Rendering,
) -> CalibrationSettings {
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    CalibrationSettings {
        source: Source::Local(path),
        rendering,
        rows: RowRange::default(),
        samples: 1,
        seq_len: 8,
        ..settings(Sampling::RandomWindows)
    }
}

fn text_column() -> Rendering {
    Rendering::Template(Template::column("text"))
}

#[test]
fn a_row_without_the_key_is_as_one_with_null_and_a_row_without_text_is_no_document() {
    let dir = tempfile::tempdir().unwrap();
    let rows = "{\"other\": 1}\n{\"text\": null}\n{\"text\": \" \\t\"}\n{\"text\": \"A cold is mild, and it ends.\"}\n";
    let drawn = Calibration::draw(&of_file(&dir, "a.jsonl", rows, text_column()), &tokenizer());
    let manifest = drawn.unwrap().manifest;
    assert_eq!(
        (manifest.row_count, manifest.null_rows, manifest.blank_rows),
        (1, 2, 1)
    );

    let refusal = |rows: &str, rendering| {
        let settings = of_file(&dir, "b.jsonl", rows, rendering);
        let look = first_look(&settings, Some(&tokenizer()))
            .unwrap_err()
            .to_string();
        let error = Calibration::draw(&settings, &tokenizer())
            .unwrap_err()
            .to_string();
        assert_eq!(look, error);
        error
    };
    let error = refusal("{\"body\": \"a\"}\n{\"body\": \"b\"}\n", text_column());
    for words in [
        "b.jsonl",
        "row 0 has no column \"text\"",
        "columns are body",
    ] {
        assert!(error.contains(words), "{words}: {error}");
    }
    let error = refusal("{\"text\": \"\"}\n{\"text\": \" \"}\n", text_column());
    assert!(
        error.contains("all 2 rows") && error.contains("have no text"),
        "{error}"
    );
    let talk = Rendering::Messages {
        column: "text".into(),
        chatml: true,
    };
    let error = refusal(
        "{\"text\": []}\n{\"text\": [{\"role\": \"user\", \"content\": \" \"}]}\n",
        talk,
    );
    assert!(error.contains("have no text"), "{error}");
    // With a template, text in one of its columns is enough.
    let both = Rendering::Template(Template::parse("Q: {a}\nA: {b}").unwrap());
    let rows = "{\"a\": \"\", \"b\": \" \"}\n{\"a\": \"\", \"b\": \"A cold is mild, and it ends soon.\"}\n";
    let manifest = Calibration::draw(&of_file(&dir, "c.jsonl", rows, both), &tokenizer())
        .unwrap()
        .manifest;
    assert_eq!((manifest.row_count, manifest.blank_rows), (1, 1));
}

#[test]
fn padded_rows_of_token_ids_are_refused_without_a_mask_and_read_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let padded = |ids: &[u32]| {
        let mut row: Vec<u32> = ids.to_vec();
        row.resize(64, 0);
        let mask: Vec<u8> = (0..64).map(|i| (i < ids.len()).into()).collect();
        (row, mask)
    };
    let rows = [padded(&[1, 400, 401, 402, 2]), padded(&[1, 7, 8, 2])];
    let tokens = || Rendering::Tokens {
        column: "input_ids".into(),
    };
    let write = |with_mask: bool| -> String {
        let row = |(ids, mask): &(Vec<u32>, Vec<u8>)| match with_mask {
            true => format!(
                "{}\n",
                serde_json::json!({"input_ids": ids, "attention_mask": mask})
            ),
            false => format!("{}\n", serde_json::json!({"input_ids": ids})),
        };
        rows.iter().map(row).collect()
    };
    let drawn = Calibration::draw(
        &of_file(&dir, "a.jsonl", &write(true), tokens()),
        &tokenizer(),
    )
    .unwrap();
    assert_eq!(
        (
            drawn.manifest.available_tokens,
            drawn.manifest.masked_tokens
        ),
        (9, 128 - 9)
    );
    let error = Calibration::draw(
        &of_file(&dir, "b.jsonl", &write(false), tokens()),
        &tokenizer(),
    );
    let error = error.unwrap_err().to_string();
    for words in [
        "b.jsonl",
        "row 0",
        "59 times the token 0 (\"<unk>\")",
        "attention_mask",
    ] {
        assert!(error.contains(words), "{words}: {error}");
    }
    let beyond = of_file(
        &dir,
        "c.jsonl",
        "{\"input_ids\": [1, 2]}\n{\"input_ids\": [1, 4096]}",
        tokens(),
    );
    let error = Calibration::draw(&beyond, &tokenizer())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("row 1") && error.contains("4096 is beyond"),
        "{error}"
    );
}

#[test]
fn windows_that_read_every_token_several_times_are_told_of() {
    let tokenizer = tokenizer();
    let text = |samples, seq_len| {
        let settings = CalibrationSettings {
            samples,
            seq_len,
            ..settings(Sampling::RandomWindows)
        };
        let drawn = Calibration::draw(&settings, &tokenizer).unwrap();
        (drawn.manifest.available_tokens, drawn.warnings())
    };
    let (available, none) = text(8, 64);
    assert!(none.is_empty() && available > 512, "{none:?}");
    let (_, warnings) = text(100, available / 20);
    assert_eq!(warnings.len(), 1);
    for words in ["100 windows", "each token is read 5.", "20 windows would"] {
        assert!(warnings[0].contains(words), "{words}: {}", warnings[0]);
    }
}

#[test]
fn a_first_look_at_a_long_file_reads_its_beginning_alone() {
    let dir = tempfile::tempdir().unwrap();
    let row = |i: usize| format!("{{\"text\": \"Row {i} says that a cold is mild.\"}}\n");
    let mut text: String = (0..5000).map(row).collect();
    text += "{broken\n";
    let settings = of_file(&dir, "a.jsonl", &text, text_column());
    let look = |settings: &CalibrationSettings| first_look(settings, Some(&tokenizer()));
    assert_eq!(look(&settings).unwrap(), Vec::<String>::new());
    assert!(Calibration::draw(&settings, &tokenizer()).is_err());
    let none = of_file(
        &dir,
        "b.jsonl",
        &text,
        Rendering::Template(Template::column("body")),
    );
    assert!(
        look(&none)
            .unwrap_err()
            .to_string()
            .contains("no column \"body\"")
    );
    let beyond = CalibrationSettings {
        rows: "9000:".parse().unwrap(),
        ..settings.clone()
    };
    assert_eq!(
        look(&beyond).unwrap(),
        Vec::<String>::new(),
        "not known without reading on"
    );
    let missing = CalibrationSettings {
        source: Source::Local(dir.path().join("none.json")),
        ..settings
    };
    assert!(
        look(&missing)
            .unwrap_err()
            .to_string()
            .contains("none.json")
    );
    assert!(
        first_look(&missing, None).is_err(),
        "without a tokenizer too"
    );
    let hub = CalibrationSettings {
        source: Source::Dataset {
            name: "a/b".into(),
            revision: "main".into(),
            files: vec![],
        },
        ..missing
    };
    assert!(look(&hub).unwrap()[0].contains("on the Hub"));
}

#[test]
fn where_the_file_and_transformers_tell_apart_the_first_rows_show_it() {
    let dir = tempfile::tempdir().unwrap();
    let rows = "{\"text\": \" A cold is mild.\"}\n{\"text\": \"A cold is mild.\"}\n";
    let settings = of_file(&dir, "a.jsonl", rows, text_column());
    let drawn = Calibration::draw(&settings, &tokenizer()).unwrap();
    let found = drawn.difference.clone().unwrap();
    assert_eq!((found.documents, found.of), (1, 2));
    // Only the file's tokenizer adds a space of its own before the first word.
    assert!(
        found.filed.contains("▁ ▁A") && !found.ours.contains("▁ ▁A"),
        "{found:?}"
    );
    let warnings = drawn.warnings();
    let words = "1 of the first 2 rows";
    assert!(
        warnings.len() == 1 && warnings[0].contains(words),
        "{warnings:?}"
    );
    assert_eq!(first_look(&settings, Some(&tokenizer())).unwrap(), warnings);
    let plain = of_file(&dir, "b.jsonl", &rows.replace("\" A", "\"A"), text_column());
    assert_eq!(
        Calibration::draw(&plain, &tokenizer()).unwrap().difference,
        None
    );
}
