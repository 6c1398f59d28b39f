//! Public templates and single constructs, compared with the output of Transformers
//! (`tests/data/chat_templates/golden.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use serde::Deserialize;

use super::*;
use crate::conversation;

/// Known differences in text or in refusal: a template, a conversation, and the reason.
const DIFFERENT: [(&str, &str, &str); 2] = [
    (
        "llama.cpp/llama-cpp-deepseek-r1.jinja",
        "tools",
        "the filter map returns a list here, but a generator there, which tojson refuses",
    ),
    (
        "llama.cpp/llama-cpp-deepseek-r1.jinja",
        "types and reasoning",
        "the filter map returns a list here, but a generator there, which tojson refuses",
    ),
];

/// Known differences of single constructs, by their beginning.
const DIFFERENT_CONSTRUCTS: [(&str, &str); 8] = [
    (
        "{{ 1 < 'a' }}",
        "two constants are compared by the library when it compiles",
    ),
    (
        "{{ none < 1 }}",
        "two constants are compared by the library when it compiles",
    ),
    (
        "{% macro f(a, b=2) %}",
        "macros take no arguments that they do not name",
    ),
    (
        "{{ \"a'b\" | list }}",
        "the library does not read \\U in a literal",
    ),
    (
        "{{ ['a', 'b'] | map('tojson')",
        "pprint breaks lines, and groups are lists",
    ),
    ("{{ namespace(a=1).a }}", "a range is printed as a list"),
    ("{{ 'x'.encode", "there are no bytes"),
    ("{{ {'a': 1}.copy() }}", "isidentifier is not there"),
];

#[derive(Deserialize)]
struct Talk {
    add_generation_prompt: bool,
    messages: Value,
    tools: Option<Value>,
}

#[derive(Deserialize)]
struct Golden {
    transformers: String,
    date: String,
    templates: BTreeMap<String, BTreeMap<String, Case>>,
    constructs: Vec<Case>,
}

/// Expected text or error.
#[derive(Deserialize)]
struct Case {
    text: Option<String>,
    error: Option<String>,
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat_templates")
}

fn golden() -> Golden {
    let file = fs::File::open(data().join("golden.json.gz")).unwrap();
    let golden: Golden = serde_json::from_reader(GzDecoder::new(file)).unwrap();
    assert_eq!(golden.transformers, "5.23.0");
    golden
}

fn json<T: for<'de> Deserialize<'de>>(name: &str) -> T {
    serde_json::from_slice(&fs::read(data().join(name)).unwrap()).unwrap()
}

/// Builds the template of a tokenizer with the script's special tokens.
fn template(source: &str, date: &str) -> Result<ChatTemplate, CalibrationError> {
    let dir = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
    });
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
    Ok(ChatTemplate::of(dir.path())?.unwrap().dated(date))
}

/// Describes the difference from the golden case, if any.
fn difference(case: &Case, rendered: Result<String, CalibrationError>) -> Option<String> {
    match (&case.text, &rendered) {
        (Some(text), Ok(ours)) if text == ours => None,
        (Some(text), Ok(ours)) => {
            let same = text.bytes().zip(ours.bytes()).take_while(|(a, b)| a == b);
            let from = text.floor_char_boundary(same.count().saturating_sub(20));
            let part = |text: &str| text[from..].chars().take(100).collect::<String>();
            Some(format!("{:?} for {:?}", part(ours), part(text)))
        }
        (Some(_), Err(error)) => Some(format!("refused: {error}")),
        (None, Ok(ours)) => Some(format!("{ours:?}, and they refuse: {:?}", case.error)),
        (None, Err(_)) => None,
    }
}

#[test]
fn public_templates_render_as_in_transformers() {
    let golden = golden();
    let talks: BTreeMap<String, Talk> = json("conversations.json");
    assert!(golden.templates.len() >= 60 && talks.len() >= 5);
    let mut unlisted = Vec::new();
    let mut listed: Vec<_> = DIFFERENT.iter().map(|(t, c, _)| (*t, *c)).collect();
    for (name, cases) in &golden.templates {
        let source = fs::read_to_string(data().join(name)).unwrap();
        let compiled = template(&source, &golden.date);
        for (talk, case) in cases {
            let Talk {
                add_generation_prompt,
                messages,
                tools,
            } = &talks[talk];
            let messages = conversation::messages(messages).unwrap();
            let tools = tools.clone().unwrap_or_default();
            let rendered = match &compiled {
                Ok(compiled) => compiled.write(&messages, &tools, *add_generation_prompt),
                Err(error) => Err(CalibrationError::Tokenizer {
                    reason: error.to_string(),
                }),
            };
            let found = difference(case, rendered);
            let known = listed.iter().position(|known| *known == (name, talk));
            match (found, known) {
                (None, _) => {}
                (Some(_), Some(known)) => {
                    listed.swap_remove(known);
                }
                (Some(difference), None) => unlisted.push(format!("{name}, {talk}: {difference}")),
            }
        }
    }
    assert!(
        unlisted.is_empty(),
        "{} differ:\n{}",
        unlisted.len(),
        unlisted.join("\n")
    );
    assert!(listed.is_empty(), "no difference any more: {listed:?}");
}

#[test]
fn constructs_render_as_in_transformers() {
    let golden = golden();
    let constructs: Vec<String> = json("constructs.json");
    assert_eq!(constructs.len(), golden.constructs.len());
    let talk = [Message::new("user", "Hi")];
    let mut unlisted = Vec::new();
    let mut listed: Vec<_> = DIFFERENT_CONSTRUCTS.iter().map(|(c, _)| *c).collect();
    for (construct, case) in constructs.iter().zip(&golden.constructs) {
        let compiled = template(construct, &golden.date);
        let found = difference(case, compiled.and_then(|it| it.render(&talk, false)));
        let known = listed.iter().position(|known| construct.starts_with(known));
        match (found, known) {
            (None, _) => {}
            (Some(_), Some(known)) => {
                listed.swap_remove(known);
            }
            (Some(difference), None) => unlisted.push(format!("{construct}\n    {difference}")),
        }
    }
    assert!(
        unlisted.is_empty(),
        "{} differ:\n{}",
        unlisted.len(),
        unlisted.join("\n")
    );
    assert!(listed.is_empty(), "no difference any more: {listed:?}");
}
