//! Question by question against lm-evaluation-harness (`tests/golden/eval`).

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use gptq_calibration::TextTokenizer;
use gptq_eval::{Encoder, Task, TaskLayout, TaskOptions, TaskScore, context_length};
use gptq_format::{read_json, sha256};
use gptq_kernels::Device;
use serde_json::{Value, json};

use crate::log_likelihoods;

fn root(path: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../..", path].iter().collect()
}

/// Reads a task of the golden values as this program does.
fn task(name: &str, golden: &Value) -> Task {
    let (file, layout) = match name.starts_with("pubmedqa") {
        true => (
            "tests/data/pubmedqa/ori_pqal.json".to_owned(),
            TaskLayout::PubMedQa,
        ),
        false => (
            format!("tests/data/choices/{name}.jsonl"),
            TaskLayout::Plain,
        ),
    };
    Task::read(&TaskOptions {
        delimiter: golden["delimiter"].as_str().unwrap().to_owned(),
        shots: golden["shots"].as_u64().unwrap() as usize,
        limit: Some(golden["questions"].as_array().unwrap().len()),
        ..TaskOptions::new(&root(&file), layout)
    })
    .unwrap()
}

/// Compares every task of a golden file with the model in `dir`; returns how many requests were cut, and how many
/// questions have a choice without tokens.
fn compare(file: &str, dir: &Path, special_tokens: bool) -> (usize, usize) {
    let golden: Value = read_json(&root("tests/golden/eval").join(file)).unwrap();
    let tokenizer = TextTokenizer::load(dir).unwrap();
    let context = context_length(dir).unwrap();
    let encoder = Encoder::new(&tokenizer, special_tokens, context);
    let names: Vec<&String> = golden.as_object().unwrap().keys().collect();
    let names = names.into_iter().filter(|name| *name != "versions");
    let tasks: Vec<(Task, &Value)> = names
        .map(|name| (task(name, &golden[name]), &golden[name]))
        .collect();
    assert!(tasks.len() > 2);
    let encoded: Vec<_> = (tasks.iter())
        .map(|(task, _)| encoder.encode(task).unwrap())
        .collect();
    let requests = encoded.iter().flat_map(|it| it.questions.iter().flatten());
    let requests: Vec<_> = requests.cloned().collect();
    let found = log_likelihoods(dir, Device::Cpu, &requests, &mut |_| ()).unwrap();
    let mut found = found.into_iter();
    let (mut cut, mut without) = (0, 0);
    for ((task, golden), encoded) in tasks.iter().zip(&encoded) {
        let right = golden["questions"].as_array().unwrap();
        assert_eq!(task.questions.len(), right.len());
        let likelihoods: Vec<Vec<f64>> = (encoded.questions.iter())
            .map(|choices| found.by_ref().take(choices.len()).collect())
            .collect();
        let score = TaskScore::of(&task.questions, &likelihoods);
        for (n, (question, right)) in task.questions.iter().zip(right).enumerate() {
            let at = format!("{file}, {}, {}", task.name, question.place);
            let prompt = sha256(task.prompt(question).as_bytes());
            assert_eq!(prompt, right["prompt_sha256"].as_str().unwrap(), "{at}");
            let theirs = right["log_likelihoods"].as_array().unwrap();
            assert_eq!(theirs.len(), likelihoods[n].len(), "{at}");
            for (own, theirs) in likelihoods[n].iter().zip(theirs) {
                let theirs = theirs.as_f64().unwrap();
                assert!((own - theirs).abs() < 1e-3, "{at}: {own} for {theirs}");
            }
            let choice = score.choices[n];
            for (own, key) in [(choice.plain, "acc"), (choice.normalized, "acc_norm")] {
                let own = f64::from(u8::from(own == question.answer));
                assert_eq!(own, right[key].as_f64().unwrap(), "{at}, {key}");
            }
        }
        for (own, key) in [(score.accuracy, "acc"), (score.accuracy_norm, "acc_norm")] {
            assert!((own.value - golden[key].as_f64().unwrap()).abs() < 1e-12);
            let stderr = golden[format!("{key}_stderr")].as_f64().unwrap();
            assert!((own.stderr.unwrap() - stderr).abs() < 1e-12, "{stderr}");
        }
        // The harness runs and counts requests of one input once.
        let inputs = encoded.questions.iter().flatten();
        let long = inputs.filter(|it| it.tokens.len() == context + 1);
        let inputs: HashSet<&[u32]> = long.map(|it| &it.tokens[..context]).collect();
        match encoded.cut {
            0 => assert_eq!(golden["cut"], 0),
            _ => assert_eq!(
                inputs.len() as u64,
                golden["cut"].as_u64().unwrap(),
                "{}",
                task.name
            ),
        }
        cut += encoded.cut;
        without += encoded.without_tokens.len();
    }
    (cut, without)
}

#[test]
fn every_question_gets_the_harness_s_log_likelihoods_with_a_bos_token() {
    let dir = root("tests/models/medi-tiny");
    let (cut, without) = compare("medi-tiny.json", &dir, true);
    assert_eq!((cut, without), (0, 2));
}

#[test]
fn every_question_gets_them_without_the_tokenizer_s_bos_token() {
    let dir = root("tests/models/medi-tiny");
    compare("medi-tiny-without-bos.json", &dir, false);
}

#[test]
fn every_question_gets_them_where_the_tokenizer_has_no_bos_token_and_prompts_are_cut() {
    let dir = tempfile::tempdir().unwrap();
    let copy = |from: &str, to: &str| {
        fs::copy(root("tests/golden").join(from), dir.path().join(to)).unwrap();
    };
    copy("families/qwen3/config.json", "config.json");
    copy("families/qwen3/model.safetensors", "model.safetensors");
    copy("smollm2_tokenizer.json", "tokenizer.json");
    let config = json!({
        "tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
    });
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let (cut, _) = compare("tokenizer-without-bos.json", dir.path(), true);
    assert!(cut > 40, "{cut}");
}
