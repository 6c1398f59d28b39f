//! `--log-file` and `RUST_LOG`: the contents of a log, and what it must not contain.

use std::fs;

use crate::harness::{Scratch, command, medi_tiny, succeeded};

const ONE: &str = "[[branch]]\nname = \"a\"\nbits = 4\n";

#[test]
fn a_log_answers_why_a_branch_is_worse() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    let log = scratch.path("run.log");
    let args = ["quantize", recipe.to_str().unwrap(), "--device", "cpu"];
    let more = [
        "--perplexity",
        "tests/data/eval_wikidoc_40.json",
        "--host-memory",
        "8GiB",
    ];
    let token = "hf_ThisIsSecret";
    let log_file = ["--log-file", log.to_str().unwrap()];
    let mut run = command(args.iter().chain(&more).chain(&log_file));
    succeeded(run.env("HF_TOKEN", token).output().unwrap());
    let text = fs::read_to_string(&log).unwrap();
    // medi-tiny has 3 blocks of 7 linear layers.
    let linears: Vec<&str> = text.lines().filter(|l| l.contains(": linear ")).collect();
    assert_eq!(linears.len(), 21, "{text}");
    for key in [
        "relative_error=",
        "rtn_error=",
        "damping=0.1",
        "dead_columns=",
        "seconds=",
        "name=\"model.layers.0.self_attn.q_proj\"",
    ] {
        assert!(linears[0].contains(key), "{key}: {}", linears[0]);
    }
    for part in [
        "tokenizer_sha256", // of the manifest
        "wikidoc_patient_information_1000.json",
        "device=\"cpu\"",
        "name = \\\"a\\\"", // of the recipe
        "mean_error=",
        "host_memory=8589934592",
        "text=\"eval_wikidoc_40.json\" window=1024 perplexity=",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains(token) && !text.contains('\u{1b}'), "{text}");
}

#[test]
fn a_token_is_never_logged_by_whomever_it_is_said() {
    let scratch = Scratch::new();
    let log = scratch.path("run.log");
    let token = "hf_ThisIsSecret";
    // A name that does not exist and contains the token, which the error repeats.
    let mut run = command(["--log-file", log.to_str().unwrap(), "inspect", token]);
    let output = run.env("HF_TOKEN", token).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("[secret]") && !text.contains(token), "{text}");

    let mut run = command(["inspect", token]);
    let run = run.env("HF_TOKEN", token).env("RUST_LOG", "trace");
    let text = String::from_utf8(run.output().unwrap().stderr).unwrap();
    assert!(
        text.contains("ERROR") && text.contains("[secret]"),
        "{text}"
    );
}

#[test]
fn a_log_that_cannot_be_written_and_a_filter_that_does_not_parse_are_told() {
    let say = |args: &[&str], filter: &str| {
        let output = command(args).env("RUST_LOG", filter).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let line = say(&["--log-file", "/no/such/dir/log", "inspect", "x"], "info");
    assert!(line.contains("--log-file /no/such/dir/log"), "{line}");
    let line = say(&["inspect", "x"], "gptq=loud=er");
    assert!(line.contains("RUST_LOG"), "{line}");
}

#[test]
fn a_reader_that_goes_away_is_no_bug() {
    let mut run = command(["inspect", "--json", "tests/models/medi-tiny"]);
    run.stdout(std::process::Stdio::piped());
    run.stderr(std::process::Stdio::piped());
    let mut child = run.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(!text.contains("bug") && text.lines().count() == 1, "{text}");
    assert!(
        text.starts_with("gptq: failed printing to stdout"),
        "{text}"
    );
}
