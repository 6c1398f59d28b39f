//! Typical calibration data, through `gptq calibration show`.

use std::fs::{self, File};
use std::io::Write;
use std::sync::Arc;

use arrow::array::{RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use serde_json::{Value, json};

use crate::harness::{
    Scratch, command, gptq, medi_tiny, refuse, refused, root, succeed, succeeded,
};

const ONE: &str = "[[branch]]\nname = \"a\"\nbits = 4\n";
const WIKIDOC: &str = "calibration/wikidoc/wikidoc_patient_information_1000.json";

/// Converts a JSON list of `input` and `output` to a Parquet file.
pub(crate) fn parquet(rows: &[u8]) -> Vec<u8> {
    let rows: Vec<Value> = serde_json::from_slice(rows).unwrap();
    let fields = ["input", "output"].map(|name| Field::new(name, DataType::Utf8, true));
    let schema = Arc::new(Schema::new(fields.to_vec()));
    let column = |name: &str| -> arrow::array::ArrayRef {
        let cells = rows.iter().map(|row| row[name].as_str());
        Arc::new(StringArray::from_iter(cells))
    };
    let columns = vec![column("input"), column("output")];
    let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
    let mut writer = ::parquet::arrow::ArrowWriter::try_new(Vec::new(), schema, None).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

fn show(recipe: &str, more: &[&str]) -> Value {
    let args = ["calibration", "show", recipe, "--json"];
    serde_json::from_str(&succeed(args.iter().chain(more))).unwrap()
}

#[test]
fn the_manifest_says_what_went_in_and_shows_the_first_window() {
    let shown = show("configs/tiny.toml", &[]);
    let manifest = &shown["manifest"];
    assert_eq!(
        manifest["files"][0]["name"],
        "wikidoc_patient_information_1000.json"
    );
    let bytes = fs::metadata(root().join(WIKIDOC)).unwrap().len();
    assert_eq!(manifest["files"][0]["bytes"], bytes);
    assert_eq!(manifest["template"], "{input}\n{output}");
    assert_eq!(
        (&manifest["samples"], &manifest["seq_len"]),
        (&json!(128), &json!(1024))
    );
    assert_eq!(manifest["unique_tokens"], 128 * 1024);
    assert_eq!(manifest["seed"], 0);
    let first = shown["first_window"].as_str().unwrap();
    let rows: Vec<Value> =
        serde_json::from_slice(&fs::read(root().join(WIKIDOC)).unwrap()).unwrap();
    let input = rows[0]["input"].as_str().unwrap();
    assert!(first.contains(input), "{input}: {first}");
    let text = succeed(["calibration", "show", "configs/tiny.toml"]);
    assert!(
        text.contains("128 of 1024, consecutive") && text.contains("SHA-256"),
        "{text}"
    );
    let hash = manifest["files"][0]["sha256"].as_str().unwrap();
    assert!(text.contains(hash), "{text}");
}

#[test]
fn files_flags_and_globs_give_the_recipe_s_windows() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    let recipe = recipe.to_str().unwrap();
    let expected = show(recipe, &[])["first_window"].clone();
    let rows: Vec<Value> =
        serde_json::from_slice(&fs::read(root().join(WIKIDOC)).unwrap()).unwrap();

    // One text per row, in two compressed files.
    for (name, rows) in [
        ("part-0.jsonl.gz", &rows[..30]),
        ("part-1.jsonl.gz", &rows[30..]),
    ] {
        let file = File::create(scratch.path(name)).unwrap();
        let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        for row in rows {
            let text = [&row["input"], &row["output"]].map(|cell| cell.as_str().unwrap());
            writeln!(gzip, "{}", json!({"text": text.join("\n")})).unwrap();
        }
        gzip.finish().unwrap();
    }
    let glob = scratch.path("part-*.jsonl.gz");
    let flags = [
        "--calibration",
        glob.to_str().unwrap(),
        "--column",
        "text",
        "--rows",
        "0:100",
    ];
    let shown = show(recipe, &flags);
    assert_eq!(shown["first_window"], expected);
    assert_eq!(shown["manifest"]["files"].as_array().unwrap().len(), 2);
    assert_eq!(shown["manifest"]["template"], "{text}");

    let path = scratch.path("rows.parquet");
    fs::write(&path, parquet(&serde_json::to_vec(&rows).unwrap())).unwrap();
    let flags = ["--calibration", path.to_str().unwrap(), "--rows", "0:100"];
    assert_eq!(show(recipe, &flags)["first_window"], expected);
}

#[test]
fn text_that_is_evaluated_on_too_is_warned_of() {
    let eval = "tests/data/eval_wikidoc_40.json";
    let warned = |calibration: &str, column: &[&str]| {
        let flags = [
            "calibration",
            "show",
            "configs/tiny.toml",
            "--perplexity",
            eval,
        ];
        let more = [
            "--calibration",
            calibration,
            "--samples",
            "1",
            "--seq-len",
            "64",
        ];
        let output = gptq(flags.iter().chain(&more).chain(column));
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    // The evaluation text itself, as a list of texts.
    let whole = warned(eval, &["--column", "text"]);
    assert!(
        whole.contains("100.0 %") && whole.contains("warning"),
        "{whole}"
    );
    let other = warned(WIKIDOC, &[]);
    assert!(!other.contains("100.0 %"), "{other}");
}

#[test]
fn a_row_without_the_column_says_which_it_has_and_how_to_choose() {
    let scratch = Scratch::new();
    let path = scratch.path("my.jsonl");
    fs::write(&path, "{\"question\": \"a\", \"answer\": \"b\"}\n").unwrap();
    let flags = ["calibration", "show", "configs/tiny.toml", "--calibration"];
    let line = refuse(flags.iter().chain(&[path.to_str().unwrap()]));
    for word in ["row 0", "\"input\"", "question", "answer", "column"] {
        assert!(line.contains(word), "{word}: {line}");
    }
}

#[test]
fn rows_with_a_null_are_told_of() {
    let scratch = Scratch::new();
    let path = scratch.path("my.json");
    // JSON lines under another extension, as in C4.
    let row = |i: usize| match i % 3 {
        0 => json!({"text": null}),
        _ => json!({"text": format!("Row {i} says that a cold is mild.")}),
    };
    let lines: String = (0..90).map(|i| format!("{}\n", row(i))).collect();
    fs::write(&path, lines).unwrap();
    let path = path.to_str().unwrap();
    let flags = [
        "calibration",
        "show",
        "configs/tiny.toml",
        "--calibration",
        path,
    ];
    let more = ["--column", "text", "--samples", "1", "--seq-len", "64"];
    let text = succeed(flags.iter().chain(&more).chain(&["--rows", "0:"]));
    assert!(
        text.contains("60 used of all rows, 30 skipped for a null"),
        "{text}"
    );
    let line = refuse(flags.iter().chain(&more).chain(&["--rows", "0:1"]));
    assert!(
        line.contains("all 1 rows") && line.contains("\"text\""),
        "{line}"
    );
}

#[test]
fn a_recipe_that_says_two_things_of_a_row_is_refused_at_its_place() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    let text = fs::read_to_string(&recipe).unwrap();
    for (more, word) in [
        ("column = \"a\"\ntokens = \"b\"", "keep one"),
        ("chat_template = \"chatml\"", "requires messages"),
        ("revision = \"main\"", "local"),
        ("files = \"*.json\"", "on the Hub"),
    ] {
        let text = text.replace("[calibration]", &format!("[calibration]\n{more}"));
        fs::write(&recipe, text).unwrap();
        let line = refuse(["quantize", recipe.to_str().unwrap()]);
        assert!(
            line.contains(word) && line.contains("recipe.toml:"),
            "{line}"
        );
    }
}

#[test]
fn text_on_its_way_to_tokens_is_kept_where_hidden_states_are() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), "[[branch]]\nname = \"a\"\nbits = 4\n");
    let place = scratch.path("place");
    fs::create_dir(&place).unwrap();
    let run = |more: &[&str]| {
        let flags = [
            "quantize",
            recipe.to_str().unwrap(),
            "--device",
            "cpu",
            "--samples",
            "2",
        ];
        let mut command = command(flags.iter().chain(more));
        command.env("TMPDIR", "/nonexistent").output().unwrap()
    };
    let line = refused(run(&[]));
    for words in ["/nonexistent: ", "TMPDIR", "--scratch"] {
        assert!(line.contains(words), "{words}: {line}");
    }
    succeeded(run(&["--scratch", place.to_str().unwrap()]));
    assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
}
