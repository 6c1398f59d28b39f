//! `gptq generate`: its messages, and the same text as Transformers.

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::harness::{Scratch, medi_tiny, refuse, root, succeed};

/// Returns one reply of the bundled model.
fn reply(args: &[&str]) -> Value {
    let fixed = [
        "generate",
        "tests/models/medi-tiny",
        "--json",
        "--device",
        "cpu",
    ];
    let line = succeed(fixed.iter().chain(args));
    serde_json::from_str(line.trim()).unwrap()
}

#[test]
fn greedy_text_is_that_of_transformers_token_for_token() {
    let golden = fs::read(root().join("tests/golden/generate.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let rows = golden["models"]["medi-tiny"].as_array().unwrap();
    assert!(!rows.is_empty());
    for row in rows {
        // The forward passes agree to 2e-3: with a smaller gap between the two best tokens either
        // may be chosen.
        assert!(row["smallest_gap"].as_f64().unwrap() > 4e-3);
        let found = reply(&[
            "--prompt",
            row["prompt"].as_str().unwrap(),
            "--greedy",
            "--ignore-eos",
            "--max-new-tokens",
            "64",
        ]);
        assert_eq!(found["tokens"], row["tokens"]);
        assert_eq!(found["finish"], "length");
        let text = found["text"].as_str().unwrap();
        assert_eq!(
            text.trim_start(),
            row["text"].as_str().unwrap().trim_start()
        );
    }
}

#[test]
fn a_seed_repeats_a_text_and_stop_strings_end_it() {
    let prompt = ["--prompt", "Asthma is", "--max-new-tokens", "24"];
    let draw = |seed| reply(&[&prompt[..], &["--seed", seed]].concat())["tokens"].clone();
    assert_eq!(draw("1"), draw("1"));
    assert_ne!(draw("1"), draw("2"));

    let text = reply(&[&prompt[..], &["--greedy"]].concat());
    let text = text["text"].as_str().unwrap();
    let word = text.split_whitespace().nth(3).unwrap();
    let stopped = reply(&[&prompt[..], &["--greedy", "--stop", word]].concat());
    assert_eq!(stopped["finish"], "stop_string");
    assert_eq!(stopped["text"], text[..text.find(word).unwrap()]);
}

#[test]
fn text_is_printed_as_it_is_and_rates_go_beside_it() {
    let args = [
        "generate",
        "tests/models/medi-tiny",
        "--prompt",
        "Asthma is",
        "--greedy",
    ];
    let output = crate::harness::gptq(args.iter().chain(&["--max-new-tokens", "8"]));
    let expected = reply(&["--prompt", "Asthma is", "--greedy", "--max-new-tokens", "8"]);
    let shown = String::from_utf8(output.stdout).unwrap();
    assert_eq!(
        shown.trim_end_matches('\n'),
        expected["text"].as_str().unwrap()
    );
    let beside = String::from_utf8(output.stderr).unwrap();
    assert!(
        beside.contains("prompt tokens at") && beside.contains("8 new tokens"),
        "{beside}"
    );
}

#[test]
fn a_chat_keeps_its_history_in_the_cache() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_gptq"))
        .args([
            "generate",
            "tests/models/medi-tiny",
            "--chat",
            "--json",
            "--greedy",
        ])
        .args([
            "--system",
            "Be brief.",
            "--max-new-tokens",
            "12",
            "--device",
            "cpu",
        ])
        .current_dir(root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = "What is asthma?\n\nIs it dangerous?\n";
    child
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let replies: Vec<Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let [first, second] = &replies[..] else {
        panic!("two replies: {replies:?}");
    };
    assert_eq!(first["cached_tokens"], 0);
    let cached = second["cached_tokens"].as_u64().unwrap();
    // The first prompt is in the cache; the reply's own tokens may not be, if its text is tokenized
    // differently.
    assert!(
        cached >= first["prompt_tokens"].as_u64().unwrap() - 1,
        "{second}"
    );
    assert!(cached < second["prompt_tokens"].as_u64().unwrap());
}

#[test]
fn a_branch_speaks_from_its_codes() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(
        &medi_tiny(),
        "[[branch]]\nname = \"a\"\nbits = 8\ngroup_size = 64\n",
    );
    succeed(["quantize", recipe.to_str().unwrap()]);
    let dir = scratch.out().join("a");
    let args = [
        "--prompt",
        "Asthma is",
        "--greedy",
        "--max-new-tokens",
        "16",
        "--json",
    ];
    let line = succeed(["generate", dir.to_str().unwrap()].iter().chain(&args));
    let found: Value = serde_json::from_str(line.trim()).unwrap();
    // At 8 bits the first tokens equal the dense model's.
    let dense = reply(&args[..5]);
    assert_eq!(found["tokens"][0], dense["tokens"][0]);
}

#[test]
fn wrong_requests_are_refused_in_one_line() {
    let model = ["generate", "tests/models/medi-tiny", "--prompt", "x"];
    let with = |args: &[&'static str]| refuse(model.iter().chain(args));
    assert!(with(&["--temperature", "0"]).contains("use greedy"));
    assert!(with(&["--top-p", "2"]).contains("at most 1"));
    assert!(with(&["--chat-template", "own"]).contains("no chat template"));
    assert!(with(&["--system", "x"]).contains("--chat-template"));
    let line = refuse(["generate", "tests/data", "--prompt", "x"]);
    assert!(line.contains("tests/data"), "{line}");
}

#[test]
fn a_turn_ends_at_the_tokenizer_s_end_token_too_and_a_plain_prompt_does_not() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let reply = |how: &[&str]| -> Value {
        let args = ["generate", model.to_str().unwrap(), "--json", "--greedy"];
        let more = [
            "--prompt",
            "What is asthma?",
            "--max-new-tokens",
            "12",
            "--device",
            "cpu",
        ];
        let text = succeed(args.iter().chain(&more).chain(how));
        serde_json::from_str(text.lines().next().unwrap()).unwrap()
    };
    let [chat, plain] = [&["--chat-template", "chatml"][..], &[]];
    let ids = |reply: &Value| -> Vec<u64> {
        let tokens = reply["tokens"].as_array().unwrap().iter();
        tokens.map(|token| token.as_u64().unwrap()).collect()
    };
    let before = [ids(&reply(chat)), ids(&reply(plain))];
    // A token that the chat generates, but not first.
    let end = before[0][4];
    let first = before[0].iter().position(|id| *id == end).unwrap();
    let json = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(model.join(name)).unwrap()).unwrap()
    };
    let tokenizer = json("tokenizer.json");
    let vocabulary = tokenizer["model"]["vocab"].as_object().unwrap().iter();
    let name = vocabulary
        .clone()
        .find(|(_, id)| id.as_u64() == Some(end))
        .unwrap()
        .0;
    let mut config = json("tokenizer_config.json");
    config["eos_token"] = name.as_str().into();
    fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
    let ended = reply(chat);
    assert_eq!(ended["finish"], "end_token");
    assert_eq!(ids(&ended), before[0][..=first]);
    assert_eq!(ids(&reply(plain)), before[1], "the model's own end alone");
}

#[test]
fn a_reply_that_ends_before_it_began_says_why() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let prompt = [
        "--prompt",
        "What is asthma?",
        "--greedy",
        "--max-new-tokens",
        "4",
    ];
    let first = reply(&prompt)["tokens"][0].clone();
    let path = model.join("generation_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["eos_token_id"] = first.clone();
    fs::write(&path, config.to_string()).unwrap();
    let model = model.to_str().unwrap();
    let said = |more: &[&str]| {
        let args = [&["generate", model], &prompt[..], more].concat();
        let output = crate::harness::gptq(args);
        assert!(output.status.success());
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let without = said(&[]);
    assert!(
        without.contains("ended at once") && without.contains(&format!("({first})")),
        "{without}"
    );
    assert!(
        without.contains("--ignore-eos") && !without.contains("--chat-template"),
        "{without}"
    );
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    fs::write(scratch.path("model/chat_template.jinja"), template).unwrap();
    let with = said(&[]);
    assert!(
        with.contains("--chat-template own") && with.contains("--chat"),
        "{with}"
    );
    let going_on = succeed([&["generate", model, "--ignore-eos"], &prompt[..]].concat());
    assert!(!going_on.trim().is_empty());
}
