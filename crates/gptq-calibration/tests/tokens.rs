//! Token ids compared with those of Transformers, for 50 difficult texts and every layout of
//! tokenizer files (`tests/golden/make_tokens.py`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gptq_calibration::TextTokenizer;
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

#[derive(Deserialize)]
struct Golden {
    texts: Vec<String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    source: String,
    model_type: String,
    patch: BTreeMap<String, Value>,
    files: BTreeMap<String, Value>,
    eos: Option<u32>,
    eos_token: Option<String>,
    transformers: Vec<Vec<u32>>,
    /// Expected tokens by the text's position, where they differ.
    filed: BTreeMap<usize, Vec<u32>>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn golden() -> Golden {
    serde_json::from_slice(&fs::read(root().join("tests/golden/tokens.json")).unwrap()).unwrap()
}

impl Case {
    /// Writes the tokenizer's directory, with extra keys in `config.json`.
    fn write(&self, config: &Value) -> TempDir {
        let dir = TempDir::new().unwrap();
        let source = match self.source.as_str() {
            "smollm2" => "tests/golden/smollm2_tokenizer.json",
            other => other,
        };
        let mut tokenizer: Value =
            serde_json::from_slice(&fs::read(root().join(source)).unwrap()).unwrap();
        for (key, value) in &self.patch {
            tokenizer[key] = value.clone();
        }
        let mut model = json!({"model_type": self.model_type});
        for (key, value) in config.as_object().unwrap() {
            model[key] = value.clone();
        }
        let put = |name: &str, value: &Value| {
            fs::write(dir.path().join(name), value.to_string()).unwrap()
        };
        put("tokenizer.json", &tokenizer);
        put("config.json", &model);
        self.files.iter().for_each(|(name, value)| put(name, value));
        dir
    }
}

#[test]
fn every_awkward_text_has_the_tokens_of_transformers() {
    let Golden { texts, cases } = golden();
    assert_eq!(texts.len(), 50);
    assert!(cases.len() >= 40);
    let rebuilt = cases.iter().filter(|case| !case.filed.is_empty()).count();
    assert!(
        rebuilt >= 20,
        "the file alone would do for all but {rebuilt}"
    );
    for case in &cases {
        let dir = case.write(&json!({}));
        let tokenizer = TextTokenizer::load(dir.path()).unwrap();
        for (text, expected) in texts.iter().zip(&case.transformers) {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(&ids, expected, "{}: {text:?}", case.name);
        }
        let end = tokenizer.end().map(|end| end.id);
        match case.eos {
            Some(eos) => assert_eq!(end, Some(eos), "{}", case.name),
            None => assert_eq!(end, None, "{}", case.name),
        }
        if let (Some(end), Some(text)) = (tokenizer.end(), &case.eos_token) {
            assert_eq!(&end.text, text, "{}", case.name);
        }
    }
}

#[test]
fn a_document_ends_once_whoever_ends_it() {
    let Golden { texts, cases } = golden();
    let mut ended = 0;
    for case in cases.iter().filter(|case| case.eos.is_some()) {
        let dir = case.write(&json!({}));
        let tokenizer = TextTokenizer::load(dir.path()).unwrap();
        let eos = case.eos.unwrap();
        for (text, expected) in texts.iter().zip(&case.transformers).step_by(7) {
            let mut expected = expected.clone();
            match expected.last() == Some(&eos) {
                true => ended += 1,
                false => expected.push(eos),
            }
            let joined = tokenizer.join(vec![text.clone(), text.clone()]).unwrap();
            assert_eq!(
                joined,
                [expected.clone(), expected].concat(),
                "{}: {text:?}",
                case.name
            );
        }
    }
    assert!(ended > 10, "{ended}");
}

#[test]
fn another_end_than_the_model_s_is_told_of_and_ids_beyond_the_model_are_refused() {
    let Golden { cases, .. } = golden();
    let find = |name: &str| cases.iter().find(|case| case.name == name).unwrap();
    let warning = |name: &str, config: Value| {
        let dir = find(name).write(&config);
        TextTokenizer::load(dir.path()).unwrap().end_warning()
    };
    // SmolLM2 as converted from GGUF: its end token is the one that opens a turn.
    let told = warning("smollm2", json!({"eos_token_id": 2})).unwrap();
    for words in [
        "token 1 (\"<|im_start|>\")",
        "config.json 2 (\"<|im_end|>\")",
        "eos_token",
    ] {
        assert!(told.contains(words), "{words}: {told}");
    }
    assert_eq!(warning("smollm2", json!({"eos_token_id": [2, 1]})), None);
    assert_eq!(warning("smollm2", json!({"eos_token_id": null})), None);
    assert_eq!(warning("smollm2", json!({})), None);
    let dir = find("smollm2").write(&json!({"eos_token_id": 1}));
    fs::write(
        dir.path().join("generation_config.json"),
        r#"{"eos_token_id": 2}"#,
    )
    .unwrap();
    let told = TextTokenizer::load(dir.path())
        .unwrap()
        .end_warning()
        .unwrap();
    assert!(
        told.contains("generation_config.json 2") && !told.contains("by config.json"),
        "{told}"
    );

    let load = |vocabulary: u32| {
        let dir = find("decoder_alone").write(&json!({"vocab_size": vocabulary}));
        let tokenizer = TextTokenizer::load(dir.path()).unwrap();
        tokenizer
            .join(vec!["Fever".into()])
            .map_err(|e| e.to_string())
    };
    assert_eq!(load(4098).unwrap().last(), Some(&4097));
    let line = load(4096).unwrap_err();
    for words in ["\"<|im_end|>\"", "4097", "vocabulary of 4096"] {
        assert!(line.contains(words), "{words}: {line}");
    }
}
