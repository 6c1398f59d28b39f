//! Problems of a run's texts are reported before any work: by `plan`, by `--dry-run`, and in the
//! first second of `quantize`.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Scratch, gptq, medi_tiny, refuse, succeed};

const ONE: &str = "[[branch]]\nname = \"a\"\nbits = 4\n";
const EVALUATION: &str = "tests/data/eval_wikidoc_40.json";

/// Writes a recipe with these lines in `[calibration]`, and more sections.
fn recipe(scratch: &Scratch, model: &Path, calibration: &str, more: &str) -> String {
    let path = scratch.path("recipe.toml");
    let text = format!(
        "[model]\nsource = {model:?}\n[calibration]\n{calibration}\n[output]\ndir = {:?}\n{more}\n{ONE}",
        scratch.out()
    );
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Returns the single line that all three commands print.
fn refused_by_all(scratch: &Scratch, recipe: &str) -> String {
    let lines = [
        refuse(["plan", recipe]),
        refuse(["quantize", recipe, "--dry-run"]),
        refuse(["quantize", recipe]),
    ];
    assert!(lines.iter().all(|line| *line == lines[0]), "{lines:?}");
    scratch.assert_nothing_written();
    lines[0].clone()
}

fn rows(scratch: &Scratch, name: &str, rows: &[Value]) -> String {
    let path = scratch.path(name);
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    fs::write(&path, lines).unwrap();
    format!("source = {path:?}\nsamples = 2\nseq_len = 32")
}

fn texts(n: usize) -> Vec<Value> {
    let text = |i| json!({"text": format!("Row {i} says that a cold is mild and ends by itself.")});
    (0..n).map(text).collect()
}

#[test]
fn what_is_wrong_with_calibration_rows_is_told_before_the_work() {
    let scratch = Scratch::new();
    let with = |calibration: &str| recipe(&scratch, &medi_tiny(), calibration, "");
    let good = rows(&scratch, "good.jsonl", &texts(50));
    let talk = json!({"talk": [{"role": "user", "content": "Hi"}]});
    let talks = rows(&scratch, "talks.jsonl", &[talk]);
    let ids: Vec<Value> = vec![json!({"input_ids": [1, 5, 9999]}); 40];
    let ids = rows(&scratch, "ids.jsonl", &ids);
    for (calibration, words) in [
        (format!("{good}\ncolumn = \"body\""), "no column \"body\""),
        (good.replace("good.jsonl", "none.jsonl"), "none.jsonl: "),
        (
            good.replace("good.jsonl", "none-*.jsonl"),
            "no file matches",
        ),
        (
            format!("{good}\ncolumn = \"text\"\nrows = \"90:\""),
            "none of the 50 rows",
        ),
        (
            good.replace(
                "samples = 2",
                "sampling = \"concatenate\"\ncolumn = \"text\"\nsamples = 2000",
            ),
            "too little calibration text",
        ),
        (format!("{talks}\nmessages = \"talk\""), "no chat template"),
        (
            format!("{talks}\nmessages = \"text\"\nchat_template = \"chatml\""),
            "no column \"text\"",
        ),
        (format!("{ids}\ntokens = \"input_ids\""), "9999 is beyond"),
    ] {
        let line = refused_by_all(&scratch, &with(&calibration));
        assert!(line.contains(words), "{words}: {line}");
    }
}

#[test]
fn what_is_wrong_with_the_tokenizer_is_told_before_the_work() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let good = format!(
        "{}\ncolumn = \"text\"",
        rows(&scratch, "good.jsonl", &texts(50))
    );
    let talk = json!({"talk": [{"role": "user", "content": "Hi"}]});
    let talks = format!(
        "{}\nmessages = \"talk\"",
        rows(&scratch, "talks.jsonl", &[talk])
    );
    let config = model.join("tokenizer_config.json");
    let own = fs::read_to_string(&config).unwrap();
    let put = |key: &str, value: Value| {
        let mut config: Value = serde_json::from_str(&own).unwrap();
        config[key] = value;
        fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
    };
    put(
        "chat_template",
        json!("{% for m in messages %}{{ m.content }"),
    );
    let line = refused_by_all(&scratch, &recipe(&scratch, &model, &talks, ""));
    assert!(
        line.contains("chat template") && line.contains("line 1"),
        "{line}"
    );
    put(
        "chat_template",
        json!("{{ raise_exception('roles must alternate') }}"),
    );
    let line = refused_by_all(&scratch, &recipe(&scratch, &model, &talks, ""));
    assert!(line.contains("roles must alternate"), "{line}");
    put("eos_token", json!("<|im_end|>"));
    let line = refused_by_all(&scratch, &recipe(&scratch, &model, &good, ""));
    assert!(
        line.contains("\"<|im_end|>\"") && line.contains("vocabulary of 4096"),
        "{line}"
    );
    fs::remove_file(&config).unwrap();
    fs::write(&config, json!({"eos_token": null}).to_string()).unwrap();
    let line = refused_by_all(&scratch, &recipe(&scratch, &model, &good, ""));
    assert!(line.contains("no end token"), "{line}");
    fs::write(model.join("tokenizer.json"), "{}").unwrap();
    let line = refused_by_all(&scratch, &recipe(&scratch, &model, &good, ""));
    assert!(line.contains("tokenizer.json: "), "{line}");
    fs::remove_file(model.join("tokenizer.json")).unwrap();
    let line = refused_by_all(&scratch, &recipe(&scratch, &model, &good, ""));
    assert!(line.contains("tokenizer.json: "), "{line}");

    // Shapes alone can be planned, with a note on what was not checked.
    fs::remove_file(model.join("model.safetensors")).unwrap();
    let output = gptq(["plan", &recipe(&scratch, &model, &good, "")]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && said.contains("not checked"),
        "{said}"
    );
    let line = refuse([
        "plan",
        &recipe(&scratch, &model, &good.replace("good", "none"), ""),
    ]);
    assert!(line.contains("none.jsonl"), "{line}");
}

#[test]
fn what_is_wrong_with_the_evaluation_text_is_told_before_the_work() {
    let scratch = Scratch::new();
    let good = format!(
        "{}\ncolumn = \"text\"",
        rows(&scratch, "good.jsonl", &texts(50))
    );
    fs::write(scratch.path("short.txt"), "Fever and cough.").unwrap();
    fs::write(scratch.path("blank.txt"), "\n \n").unwrap();
    rows(&scratch, "other.jsonl", &[json!({"body": "a"})]);
    let with = |file: &str, window: usize| {
        let file = scratch.path(file);
        let more = format!("[evaluation]\ntext = {file:?}\nwindow = {window}");
        refused_by_all(&scratch, &recipe(&scratch, &medi_tiny(), &good, &more))
    };
    assert!(with("none.txt", 64).contains("none.txt: "));
    let line = with("short.txt", 64);
    assert!(
        line.contains("do not fill one window of 64") && line.contains("--window "),
        "{line}"
    );
    assert!(with("blank.txt", 64).contains("no text"));
    assert!(with("other.jsonl", 64).contains("no column \"text\""));
    assert!(with("good.jsonl", 64).contains("is used for calibration"));
    assert!(with("short.txt", 1).contains("at least 2"));
}

#[test]
fn ids_beyond_the_vocabulary_are_found_in_the_dry_run_wherever_they_are() {
    let scratch = Scratch::new();
    let mut ids: Vec<Value> = (0..6000)
        .map(|i| json!({"ids": [1, 5 + i % 4000, 2]}))
        .collect();
    ids[5900] = json!({"ids": [1, 4096]});
    let calibration = format!("{}\ntokens = \"ids\"", rows(&scratch, "ids.jsonl", &ids));
    let recipe = recipe(&scratch, &medi_tiny(), &calibration, "");
    // A plan reads only the first rows.
    succeed(["plan", &recipe]);
    let line = refuse(["quantize", &recipe, "--dry-run"]);
    assert!(
        line.contains("row 5900") && line.contains("4096 is beyond"),
        "{line}"
    );
}

#[test]
fn what_should_be_known_of_the_texts_is_said_by_all_who_read_them() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let text = fs::read_to_string(model.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["eos_token_id"] = json!(77);
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let good = rows(&scratch, "good.jsonl", &texts(10)).replace("samples = 2", "samples = 64");
    let more = format!("[evaluation]\ntext = {EVALUATION:?}\nwindow = 3000");
    let recipe = recipe(
        &scratch,
        &model,
        &format!("{good}\ncolumn = \"text\""),
        &more,
    );
    let words = [
        "ends documents with token 2 (\"</s>\")",
        "differs: config.json 77",
        "each token is read",
        "would read each once",
        "after the last full window of 3000",
    ];
    for args in [
        &["plan", &recipe][..],
        &["quantize", &recipe, "--dry-run"],
        &["calibration", "show", &recipe],
        &["quantize", &recipe],
    ] {
        let output = gptq(args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        for words in words {
            assert_eq!(said.matches(words).count(), 1, "{args:?}: {words}: {said}");
        }
    }
    let branch = scratch.out().join("a");
    let branch = branch.to_str().unwrap();
    let output = gptq(["verify", branch, "--text", EVALUATION, "--window", "3000"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains(words[0]) && said.contains(words[4]), "{said}");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.contains("more do not fill a window"), "{shown}");
    let receipt: Value =
        serde_json::from_slice(&fs::read(Path::new(branch).join("verify.json")).unwrap()).unwrap();
    let left_over = receipt["perplexity"]["left_over"].as_u64().unwrap();
    assert!(left_over > 0 && left_over < 3000, "{left_over}");
}

#[test]
fn calibration_show_names_what_joins_documents_and_says_what_it_compared() {
    let scratch = Scratch::new();
    let good = format!(
        "{}\ncolumn = \"text\"",
        rows(&scratch, "good.jsonl", &texts(50))
    );
    let recipe = recipe(&scratch, &medi_tiny(), &good, "");
    let args = ["calibration", "show", &recipe, "--perplexity", EVALUATION];
    let text = succeed(args);
    for words in [
        "end token \"</s>\" (2)",
        "before each document: \"<s>\" (1)",
        "50 used of all rows",
        "overlap with the calibration rows: none",
        "windows of 1024",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    let json: Value = serde_json::from_str(&succeed(args.iter().chain(&["--json"]))).unwrap();
    assert_eq!(json["end_token"], json!({"text": "</s>", "id": 2}));
    assert_eq!(json["bos_token"], json!({"text": "<s>", "id": 1}));
    let (windows, left_over) = (
        &json["evaluation"]["windows"],
        &json["evaluation"]["left_over"],
    );
    let tokens = 1024 * windows.as_u64().unwrap() + left_over.as_u64().unwrap();
    assert_eq!(json["evaluation"]["tokens"], tokens);
    // A text shorter than a window can still be compared.
    fs::write(scratch.path("short.txt"), "Fever and cough.").unwrap();
    let short = scratch.path("short.txt");
    let output = gptq([
        "calibration",
        "show",
        &recipe,
        "--perplexity",
        short.to_str().unwrap(),
    ]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("--window "));
    assert!(String::from_utf8_lossy(&output.stdout).contains("0 windows of 1024"));
}
