//! `gptq requantize`: quantizes finished branches again with other data.

use std::fs;

use serde_json::Value;

use crate::harness::{Scratch, medi_tiny, refuse, succeed};

const TWO: &str = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\n\
                   [[branch]]\nname = \"b\"\nbits = 8\ngroup_size = -1\n";

fn report(scratch: &Scratch, branch: &str) -> Value {
    let path = scratch.path(branch).join("report.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn branches_are_made_again_on_other_rows_and_compared() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    // Flags change a recipe; they count the second time too.
    succeed(["quantize", recipe.to_str().unwrap(), "--samples", "4"]);
    let rows = scratch.path("my.jsonl");
    let text = "Take the tablets with water, and see a doctor if the fever stays. ".repeat(4);
    let lines: Vec<String> = (0..60)
        .map(|i| serde_json::json!({"note": format!("Note {i}. {text}")}).to_string())
        .collect();
    fs::write(&rows, lines.join("\n")).unwrap();
    let (out, rows) = (scratch.out(), rows.display().to_string());
    let dir = out.to_str().unwrap();
    let flags = [
        "requantize",
        dir,
        "--calibration",
        &rows,
        "--column",
        "note",
    ];
    let eval = ["--perplexity", "tests/data/eval_wikidoc_40.json"];
    let printed = succeed(flags.iter().chain(&eval));
    let table = printed.rsplit("branch  ").next().unwrap();
    for word in ["output error", "was", "perplexity", "\na ", "\nb "] {
        assert!(table.contains(word), "{word}: {printed}");
    }
    let (old, new) = (
        report(&scratch, "out/a"),
        report(&scratch, "out-recalibrated/a"),
    );
    assert_eq!(new["quantize_config"], old["quantize_config"]);
    assert_eq!(new["calibration"]["samples"], 4);
    assert_eq!(new["calibration"]["seq_len"], old["calibration"]["seq_len"]);
    assert_eq!(new["calibration"]["source"], "my.jsonl");
    assert_eq!(
        new["calibration"]["row_count"], 60,
        "not the recipe's rows = 0:100 of other data"
    );
    let bytes = |dir: &str| fs::read(scratch.path(dir).join("a/model.safetensors")).unwrap();
    assert!(bytes("out") != bytes("out-recalibrated"), "other codes");
    // The old branches are unchanged.
    assert!(scratch.path("out/b/model.safetensors").exists());
    assert!(
        scratch
            .path("out-recalibrated/b/model.safetensors")
            .exists()
    );

    // One branch, with its original data, into another directory: the same bytes.
    let again = scratch.path("again").display().to_string();
    let one = [
        "requantize",
        dir,
        "--branch",
        "a",
        "--output",
        &again,
        "--rows",
        "0:100",
        "--calibration",
        "calibration/wikidoc/wikidoc_patient_information_1000.json",
    ];
    succeed(one);
    assert!(bytes("out") == bytes("again"), "byte for byte");
    assert!(!scratch.path("again/b").exists());
}

#[test]
fn a_directory_without_branches_is_refused() {
    let scratch = Scratch::new();
    let flags = ["--calibration", "tests/data/eval_wikidoc_40.json"];
    let refused = |dir: &str| refuse(["requantize", dir].iter().chain(&flags));
    let line = refused("tests/models");
    assert!(line.contains("no branch with a report.json"), "{line}");
    let line = refused("no/such/dir");
    assert!(line.contains("no/such/dir"), "{line}");
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    succeed(["quantize", recipe.to_str().unwrap(), "--branch", "a"]);
    let out = scratch.out().display().to_string();
    let flags = ["--branch", "c", "--calibration", "my.json"];
    let line = refuse(["requantize", &out].iter().chain(&flags));
    assert!(line.contains("no branch \"c\"; it has: a"), "{line}");
}

#[test]
fn no_file_of_a_branch_names_a_directory_of_this_machine_and_the_model_can_be_given_again() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&scratch.copy_model(), TWO);
    let here = scratch.path("").display().to_string();
    assert!(fs::read_to_string(&recipe).unwrap().contains(&here));
    let flags = [
        "--branch",
        "a",
        "--perplexity",
        "tests/data/eval_wikidoc_40.json",
    ];
    let args = ["quantize", recipe.to_str().unwrap()];
    succeed(args.iter().chain(&flags));
    for file in fs::read_dir(scratch.out().join("a")).unwrap() {
        let file = file.unwrap().path();
        let bytes = fs::read(&file).unwrap();
        let found = bytes.windows(here.len()).any(|run| run == here.as_bytes());
        assert!(!found, "{}", file.display());
    }
    let out = scratch.out().display().to_string();
    let data = "calibration/wikidoc/wikidoc_patient_information_1000.json";
    let again = ["requantize", &out, "--calibration", data, "--rows", "0:100"];
    let line = refuse(again);
    assert!(
        line.contains("\"model\"") && line.contains("--model"),
        "{line}"
    );
    let model = scratch.path("model").display().to_string();
    succeed(again.iter().chain(&["--model", &model]));
    let bytes = |dir: &str| fs::read(scratch.path(dir).join("a/model.safetensors")).unwrap();
    assert!(bytes("out") == bytes("out-recalibrated"), "the same data");
}
