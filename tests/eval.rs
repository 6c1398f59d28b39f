//! `gptq eval`: accuracies side by side, their record, and everyone who reads it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{Scratch, command, gptq, medi_tiny, refuse, refused, root, succeed};
use crate::hub_server::{HubServer, silent};

const TASK: &str = "tests/data/choices/spaced.jsonl";

const TWO: &str = "[[branch]]\nname = \"main\"\nbits = 4\ngroup_size = 64\n\
                   [[branch]]\nname = \"narrow\"\nbits = 2\ngroup_size = 32\n";

/// Makes two finished branches.
fn matrix(scratch: &Scratch) -> PathBuf {
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    succeed(["quantize", recipe.to_str().unwrap()]);
    scratch.out()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Asks models on the CPU, with JSON output.
fn ask(models: &[&str], more: &[&str]) -> Value {
    let fixed = ["eval", "--device", "cpu", "--json"];
    let text = succeed(fixed.iter().chain(models).chain(more));
    serde_json::from_str(&text).unwrap()
}

#[test]
fn branches_and_the_dense_model_are_asked_side_by_side_and_their_answers_are_on_record() {
    let scratch = Scratch::new();
    let out = matrix(&scratch);
    let dir = out.to_str().unwrap();
    let dense = "tests/models/medi-tiny";
    let found = ask(&[dense, dir], &["--task", TASK]);
    let task = &found["tasks"][0];
    assert_eq!(
        (&task["name"], &task["questions"]),
        (&json!("spaced"), &json!(9))
    );
    let models = task["models"].as_array().unwrap();
    let names: Vec<&str> = models
        .iter()
        .map(|it| it["model"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["medi-tiny", "main", "narrow"]);
    // The harness's own numbers of the dense model.
    let golden = read(&root().join("tests/golden/eval/medi-tiny.json"));
    let golden = &golden["spaced"];
    assert_eq!(models[0]["accuracy"]["value"], golden["acc"]);
    assert_eq!(models[0]["accuracy_norm"]["value"], golden["acc_norm"]);
    let right = |model: &Value| -> Vec<bool> {
        let questions = model["questions"].as_array().unwrap().iter();
        questions.map(|it| it["choice"] == it["answer"]).collect()
    };
    let pairs = task["pairs"].as_array().unwrap();
    assert_eq!(pairs.len(), 3);
    let both = right(&models[0]).into_iter().zip(right(&models[2]));
    let lost = both.filter(|it| *it == (true, false)).count();
    assert_eq!(
        (&pairs[1]["to"], &pairs[1]["lost"]),
        (&json!("narrow"), &json!(lost))
    );

    // The record is in the branches, not in the model, and the next task joins it.
    assert!(!medi_tiny().join("eval.json").exists());
    ask(&[dir], &["--task", TASK, "--limit", "4", "--no-bos"]);
    let record = read(&out.join("narrow/eval.json"));
    let tasks = record["tasks"].as_array().unwrap();
    assert_eq!(tasks.len(), 2);
    assert_eq!(tasks[0]["dense"]["flips"]["lost"], lost);
    assert_eq!(tasks[0]["file"]["name"], "spaced.jsonl");
    assert_eq!(
        (&tasks[1]["questions"], &tasks[1]["available"]),
        (&json!(4), &json!(9))
    );
    assert_eq!(tasks[1].get("dense"), None);
    let weights = fs::read(out.join("narrow/model.safetensors")).unwrap();
    let digest = &record["weights"]["model.safetensors"];
    assert_eq!(digest["sha256"], gptq_format::sha256(&weights));
    let text = record.to_string();
    assert!(!text.contains(dir), "no place of this machine: {text}");

    // Everything that shows branches shows them.
    let harness = root().join("tests/golden/eval/results.json");
    let narrow = out.join("narrow");
    let import = [
        "eval",
        narrow.to_str().unwrap(),
        "--harness",
        harness.to_str().unwrap(),
    ];
    let shown = succeed(import);
    assert!(shown.contains("by lm_eval 0.4.13"), "{shown}");
    succeed(["report", dir]);
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    for words in [
        "Accuracy, spaced<",
        "Over dense, spaced<",
        "Accuracy, spaced, first 4<",
        "Accuracy against size",
    ] {
        assert!(page.contains(words), "{words}");
    }
    let row = read(&out.join("report-table.json"))[1].clone();
    let row = if row["branch"] == "narrow" {
        row
    } else {
        read(&out.join("report-table.json"))[0].clone()
    };
    assert_eq!(row["accuracies"][0]["task"], "spaced");
    assert_eq!(
        row["accuracies"][0]["accuracy"],
        tasks[0]["accuracy"]["value"]
    );
    succeed(["card", dir, "--repo", "user/medi-tiny-GPTQ"]);
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    let heading = card
        .lines()
        .find(|line| line.starts_with("| Branch | Bits"))
        .unwrap();
    assert!(
        heading.contains("| Accuracy, spaced | Accuracy, spaced, first 4 | Accuracy, "),
        "{heading}"
    );
    assert!(heading.contains("by lm_eval 0.4.13"), "{heading}");
    let main = card
        .lines()
        .find(|line| line.starts_with("| [main]"))
        .unwrap();
    let shown = format!(
        "{:.2} ± ",
        100.0 * models[1]["accuracy"]["value"].as_f64().unwrap()
    );
    assert!(
        main.contains(&shown) && main.contains("| not measured |"),
        "{main}"
    );
    let columns = |line: &str| line.matches(" |").count();
    let rule = card
        .lines()
        .find(|line| line.starts_with("| --- | --- | --- | --- |"))
        .unwrap();
    assert_eq!(
        (columns(heading), columns(main)),
        (columns(rule), columns(rule))
    );
}

#[test]
fn answers_of_other_weights_are_not_published_shown_or_kept() {
    let (scratch, hub) = (Scratch::new(), HubServer::start());
    let out = matrix(&scratch);
    let main = out.join("main");
    let dir = main.to_str().unwrap();
    succeed(["verify", dir]);
    ask(&[dir], &["--task", TASK]);
    // Answers that came after the verification change nothing about it.
    fs::remove_dir_all(out.join("narrow")).unwrap();
    let publish = |more: &[&str]| {
        let args = [
            "publish",
            out.to_str().unwrap(),
            "--repo",
            "me/medi",
            "--dry-run",
        ];
        silent(
            &mut command(args.iter().chain(more)),
            &hub.url(),
            "hf_token",
        )
    };
    let sent = publish(&[]);
    let text = String::from_utf8_lossy(&sent.stdout).into_owned();
    assert!(
        sent.status.success() && text.contains("eval.json"),
        "{text}"
    );
    let record = main.join("eval.json");
    let text = fs::read_to_string(&record).unwrap();
    let digest = read(&record)["weights"]["model.safetensors"]["sha256"].clone();
    let other = text.replace(digest.as_str().unwrap(), &"0".repeat(64));
    fs::write(&record, &other).unwrap();
    for more in [&[][..], &["--unverified"]] {
        let line = refused(publish(more));
        assert!(
            line.contains("eval.json") && line.contains("gptq eval"),
            "{line}"
        );
    }
    let row = |out: &Path| read(&out.join("report-table.json"))[0]["accuracies"].clone();
    succeed(["report", out.to_str().unwrap()]);
    assert_eq!(row(&out), json!([]));
    let asked = gptq([
        "eval", dir, "--task", TASK, "--limit", "3", "--device", "cpu",
    ]);
    let stderr = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert!(stderr.contains("were of other weights"), "{stderr}");
    assert_eq!(read(&record)["tasks"].as_array().unwrap().len(), 1);
    assert_eq!(
        read(&record)["weights"]["model.safetensors"]["sha256"],
        digest
    );
}

#[test]
fn a_task_that_shares_text_with_the_calibration_is_warned_of() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    let rows = root().join("calibration/wikidoc/wikidoc_patient_information_1000.json");
    let rows = read(&rows);
    let task = scratch.path("task.jsonl");
    let row =
        |text: &Value| json!({"prompt": text, "choices": ["a", "b"], "answer": 0}).to_string();
    fs::write(
        &task,
        row(&rows[3]["output"]) + "\n" + &row(&json!("Is it?")),
    )
    .unwrap();
    let recipe = recipe.to_str().unwrap();
    let found = ask(
        &["tests/models/medi-tiny"],
        &[
            "--task",
            task.to_str().unwrap(),
            "--recipe",
            recipe,
            "--limit",
            "1",
        ],
    );
    let warning = found["warnings"][0].as_str().unwrap();
    assert!(
        warning.contains("also occur in the calibration rows"),
        "{warning}"
    );
    let other = ask(
        &["tests/models/medi-tiny"],
        &["--task", TASK, "--recipe", recipe, "--limit", "3"],
    );
    assert_eq!(other["warnings"], json!([]));
}

#[test]
fn choices_without_tokens_are_told_and_mistakes_are_one_line() {
    let joined = "tests/data/choices/joined.jsonl";
    let found = ask(
        &["tests/models/medi-tiny"],
        &["--task", joined, "--delimiter", ""],
    );
    let warning = found["warnings"][0].as_str().unwrap();
    assert!(
        warning.contains("2 questions of joined") && warning.contains("row 1"),
        "{warning}"
    );
    let tiny = "tests/models/medi-tiny";
    for (args, words) in [
        (
            vec![tiny, "--task", "tests/data/README.md"],
            ["README.md", "format"],
        ),
        (
            vec![tiny, "--task", TASK, "--shots", "2"],
            ["2 shots", "--shots-from"],
        ),
        (
            vec!["tests/data", "--task", TASK],
            ["tests/data", "checkpoint"],
        ),
        (vec![tiny, "--harness", TASK], ["spaced.jsonl", "line 2"]),
        (
            vec![tiny, "--harness", "tests/golden/eval/results.json"],
            ["not a branch", "medi-tiny"],
        ),
        (
            vec![
                tiny,
                "--task",
                "tests/data/pubmedqa/test_ground_truth.json",
                "--preset",
                "pubmedqa",
            ],
            ["key ", "QUESTION"],
        ),
    ] {
        let line = refuse(["eval"].iter().chain(&args));
        assert!(words.iter().all(|word| line.contains(word)), "{line}");
    }
}
