//! Conversations with a tokenizer's own template: refusals, the date, tools.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::*;
use crate::{OnError, Rendering, RowRange, Source, is_date};

/// The bundled tokenizer with a template of its own.
fn tokenizer(dir: &TempDir, template: &str) -> TextTokenizer {
    let root: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../../tests/models/medi-tiny"]
        .iter()
        .collect();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(root.join(name), dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    TextTokenizer::load(dir.path()).unwrap()
}

fn settings(rows: &Path) -> CalibrationSettings {
    CalibrationSettings {
        source: Source::Local(rows.into()),
        rendering: Rendering::Messages {
            column: "messages".into(),
            chatml: false,
        },
        rows: RowRange::default(),
        min_tokens: 0,
        dedupe: false,
        on_error: OnError::Stop,
        date: None,
        samples: 1,
        seq_len: 8,
        seed: 0,
        sampling: Sampling::Concatenate,
    }
}

fn write(dir: &TempDir, rows: &[serde_json::Value]) -> PathBuf {
    let path = dir.path().join("rows.jsonl");
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    fs::write(&path, lines).unwrap();
    path
}

fn row(role: &str) -> serde_json::Value {
    serde_json::json!({"messages": [{"role": role, "content": "What is a cold?"}]})
}

const STRICT: &str = "{% for m in messages %}\n{% if m.role != 'user' %}\n\
                      {{ raise_exception('no ' + m.role) }}{% endif %}{{ m.content }}{% endfor %}";

#[test]
fn an_objection_names_file_row_and_template_or_leaves_the_row_out() {
    let dir = TempDir::new().unwrap();
    let tokenizer = tokenizer(&dir, STRICT);
    let mut rows = vec![row("user"); 5];
    rows[3] = row("critic");
    let path = write(&dir, &rows);
    let error = Calibration::draw(&settings(&path), &tokenizer)
        .unwrap_err()
        .to_string();
    for words in [
        "rows.jsonl: row 3: ",
        "chat_template.jinja, line 3: no critic",
    ] {
        assert!(error.contains(words), "{error}");
    }
    let skip = CalibrationSettings {
        on_error: OnError::Skip,
        samples: 2,
        ..settings(&path)
    };
    let drawn = Calibration::draw(&skip, &tokenizer).unwrap();
    assert_eq!(
        (drawn.manifest.row_count, drawn.manifest.objected_rows),
        (4, 1)
    );
    let manifest = serde_json::to_value(&drawn.manifest).unwrap();
    assert_eq!(manifest.get("date"), None, "the template asked for none");
    // A row that is not a conversation is a fault of the data, whatever the template does.
    let path = write(&dir, &[serde_json::json!({"messages": "Hi"})]);
    let wrong = CalibrationSettings {
        on_error: OnError::Skip,
        ..settings(&path)
    };
    assert!(Calibration::draw(&wrong, &tokenizer).is_err());
    // Every row is skipped.
    let path = write(&dir, &[row("critic"), row("judge")]);
    let none = CalibrationSettings {
        on_error: OnError::Skip,
        ..settings(&path)
    };
    let error = Calibration::draw(&none, &tokenizer)
        .unwrap_err()
        .to_string();
    for words in ["refuses all 2 rows", "row 0", "no critic"] {
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn the_date_is_told_and_recorded_where_a_template_asks() {
    let dir = TempDir::new().unwrap();
    let tokenizer = tokenizer(
        &dir,
        "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}",
    );
    let path = write(&dir, &[row("user")]);
    let dated = |date: &str| {
        let settings = CalibrationSettings {
            date: Some(date.into()),
            ..settings(&path)
        };
        Calibration::draw(&settings, &tokenizer)
    };
    let drawn = dated("2024-07-26").unwrap();
    let text = tokenizer.decode(&drawn.windows[0]).unwrap();
    assert!(text.starts_with("26 Jul"), "{text}");
    assert_eq!(drawn.manifest.date.as_deref(), Some("2024-07-26"));
    let now = Calibration::draw(&settings(&path), &tokenizer).unwrap();
    let now = now.manifest.date.unwrap();
    assert!(
        is_date(&now) && now.len() == "2024-07-26T08:15:00".len(),
        "{now}"
    );
    assert!(
        dated("yesterday")
            .unwrap_err()
            .to_string()
            .contains("2026-11-30")
    );
}

#[test]
fn the_tools_of_a_row_go_to_the_template_for_tools() {
    let dir = TempDir::new().unwrap();
    let tokenizer = tokenizer(&dir, "{{ tools is none }} {{ messages[0].content }}");
    let more = dir.path().join("additional_chat_templates");
    fs::create_dir(&more).unwrap();
    fs::write(
        more.join("tool_use.jinja"),
        "{{ tools[0].name }} {{ messages[0].content }}",
    )
    .unwrap();
    let window = |tools: serde_json::Value| {
        let mut row = row("user");
        row["tools"] = tools;
        let path = write(&dir, &[row]);
        let drawn = Calibration::draw(&settings(&path), &tokenizer)?;
        tokenizer.decode(&drawn.windows[0])
    };
    let given = window(serde_json::json!([{"name": "weather"}])).unwrap();
    assert!(given.starts_with("weather"), "{given}");
    let none = window(serde_json::Value::Null).unwrap();
    assert!(none.starts_with("True"), "{none}");
    let error = window(serde_json::json!({"name": "weather"}))
        .unwrap_err()
        .to_string();
    for words in ["row 0", "\"tools\"", "an object, not a list of tools"] {
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_template_that_does_not_compile_is_found_without_a_row() {
    let dir = TempDir::new().unwrap();
    let tokenizer = tokenizer(&dir, "a\n{% if %}");
    let settings = settings(dir.path());
    let error = settings.chat(&tokenizer).unwrap_err().to_string();
    assert!(error.contains("chat_template.jinja, line 2: "), "{error}");
    fs::remove_file(dir.path().join("chat_template.jinja")).unwrap();
    let error = settings.chat(&tokenizer).unwrap_err().to_string();
    assert!(error.contains("chatml"), "{error}");
}
