//! Entries are those that the package gguf reads from the same tokenizers.

use std::path::PathBuf;

use serde_json::json;

use super::*;

fn tests(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests")
        .join(path)
}

/// Copies a tokenizer beside a config.
fn tokenizer(from: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tests(from).join(file), dir.path().join(file)).unwrap();
    }
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    dir
}

fn found(dir: &Path, vocabulary: usize) -> BTreeMap<String, GgufValue> {
    entries(dir, vocabulary).unwrap().into_iter().collect()
}

#[test]
fn merges_and_special_tokens_are_those_that_the_package_gguf_reads() {
    let golden = std::fs::read(tests("golden/gguf/tokenizers.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    for (name, from, vocabulary) in [
        ("medi-tiny", "models/medi-tiny", 4096),
        ("families", "golden/families", 512),
    ] {
        let dir = tokenizer(from);
        let (found, golden) = (found(dir.path(), vocabulary), &golden[name]);
        let ids = golden["ids"].as_object().unwrap();
        for (token, id) in ids {
            let key = match token.as_str() {
                "unk" => "tokenizer.ggml.unknown_token_id".to_owned(),
                other => format!("tokenizer.ggml.{other}_token_id"),
            };
            assert_eq!(
                found[&key],
                GgufValue::U32(id.as_u64().unwrap() as u32),
                "{key}"
            );
        }
        assert_eq!(
            found["tokenizer.ggml.add_bos_token"],
            GgufValue::Bool(golden["adds"]["bos"] == true)
        );
        assert_eq!(
            found["tokenizer.ggml.add_eos_token"],
            GgufValue::Bool(golden["adds"]["eos"] == true)
        );
        let merges = golden["merges"].as_array().unwrap().iter();
        let merges: Vec<String> = merges.map(|it| it.as_str().unwrap().to_owned()).collect();
        match found.get("tokenizer.ggml.merges") {
            Some(own) => assert_eq!(own, &GgufValue::Texts(merges)),
            None => {
                let (GgufValue::F32s(scores), GgufValue::Texts(texts)) = (
                    &found["tokenizer.ggml.scores"],
                    &found["tokenizer.ggml.tokens"],
                ) else {
                    panic!("of other types");
                };
                // Earlier merges have higher scores.
                let score = |merge: &String| {
                    let text = merge.replacen(' ', "", 1);
                    scores[texts.iter().position(|it| *it == text).unwrap()]
                };
                assert_eq!(score(&merges[0]), 0.0);
                assert!(
                    merges
                        .iter()
                        .take(500)
                        .is_sorted_by_key(|merge| -score(merge) as i64)
                );
            }
        }
    }
}

#[test]
fn entries_are_those_of_the_converter_of_llama_cpp() {
    let golden = std::fs::read(tests("golden/gguf/converted.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    for (name, from, vocabulary) in [
        ("medi-tiny", "models/medi-tiny", 4096),
        ("llama", "golden/families", 512),
    ] {
        let dir = tokenizer(from);
        let found = found(dir.path(), vocabulary);
        let expected = golden[name]["metadata"].as_object().unwrap().iter();
        for (key, expected) in expected.filter(|(key, _)| key.starts_with("tokenizer.")) {
            // Without tokenizer.model, the converter gives all tokens one score, and those of merges are here; the name
            // of a way to split is one that the converter was told; nothing here separates texts.
            let own = ["scores", "pre", "add_sep_token"].map(|end| format!("tokenizer.ggml.{end}"));
            if own.contains(key) {
                continue;
            }
            let value = match found.get(key) {
                Some(GgufValue::Texts(all)) => json!(all),
                // The converter has the unknown token as a control token where the settings list it.
                Some(GgufValue::I32s(all)) => {
                    let known = all
                        .iter()
                        .map(|it| if *it == UNKNOWN { CONTROL } else { *it });
                    json!(known.collect::<Vec<_>>())
                }
                Some(GgufValue::U32(n)) => json!(n),
                Some(GgufValue::Bool(is)) => json!(is),
                Some(GgufValue::Text(text)) => json!(text),
                other => panic!("{name}: {key} is {expected}, here {other:?}"),
            };
            let value = match value.as_array() {
                Some(all) => json!({
                    "length": all.len(), "sha256": gptq_format::sha256(value.to_string().as_bytes()),
                }),
                None => value,
            };
            assert_eq!(&value, expected, "{name}: {key}");
        }
    }
}

#[test]
fn tokens_have_their_kinds_and_what_is_missing_is_filled() {
    let dir = tokenizer("models/medi-tiny");
    let found = found(dir.path(), 4100);
    let (GgufValue::Texts(texts), GgufValue::I32s(kinds)) = (
        &found["tokenizer.ggml.tokens"],
        &found["tokenizer.ggml.token_type"],
    ) else {
        panic!("of other types");
    };
    assert_eq!((texts.len(), kinds.len()), (4100, 4100));
    assert_eq!(
        (&*texts[0], kinds[0], kinds[1], kinds[2]),
        ("<unk>", UNKNOWN, CONTROL, CONTROL)
    );
    let byte = texts.iter().position(|it| it == "<0x0A>").unwrap();
    assert_eq!(kinds[byte], BYTE);
    assert_eq!((&*texts[4099], kinds[4099]), ("[PAD4099]", UNUSED));
    assert_eq!(
        found["tokenizer.ggml.model"],
        GgufValue::Text("llama".into())
    );
    assert_eq!(
        found["tokenizer.ggml.add_space_prefix"],
        GgufValue::Bool(true)
    );
    let line = entries(dir.path(), 100).unwrap_err().to_string();
    assert!(
        line.contains("4096 tokens, but the model's vocabulary is 100"),
        "{line}"
    );
}

#[test]
fn a_sentencepiece_model_gives_pieces_and_scores() {
    let dir = tokenizer("models/medi-tiny");
    let mut model = Vec::new();
    for (text, score, kind) in [
        ("<unk>", 0f32, 2u8),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("\u{2581}a", -1.5, 1),
    ] {
        model.extend([0x0a, text.len() as u8 + 9, 0x0a, text.len() as u8]);
        model.extend(text.as_bytes());
        model.push(0x15);
        model.extend(score.to_le_bytes());
        model.extend([0x18, kind]);
    }
    std::fs::write(dir.path().join("tokenizer.model"), model).unwrap();
    let found = found(dir.path(), 6);
    let (GgufValue::F32s(scores), GgufValue::I32s(kinds)) = (
        &found["tokenizer.ggml.scores"],
        &found["tokenizer.ggml.token_type"],
    ) else {
        panic!("of other types");
    };
    assert_eq!(scores[3], -1.5);
    assert_eq!(
        kinds[..],
        [UNKNOWN, CONTROL, CONTROL, NORMAL, UNUSED, UNUSED]
    );
    std::fs::write(dir.path().join("tokenizer.model"), "no protobuf").unwrap();
    assert!(
        entries(dir.path(), 6)
            .unwrap_err()
            .to_string()
            .contains("no SentencePiece model")
    );
}

#[test]
fn a_chat_template_goes_along_and_other_tokenizers_are_refused() {
    let dir = tokenizer("golden/families");
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ messages }}").unwrap();
    let found = found(dir.path(), 512);
    assert_eq!(
        found["tokenizer.chat_template"],
        GgufValue::Text("{{ messages }}".into())
    );
    assert_eq!(found["tokenizer.ggml.pre"], GgufValue::Text("gpt-2".into()));
    let path = dir.path().join("tokenizer.json");
    for (tokenizer, words) in [
        (json!({"model": {"type": "Unigram"}}), "of the kind Unigram"),
        (
            json!({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "x"}}, {"type": "ByteLevel", "use_regex": false}]}}),
            "no name for",
        ),
    ] {
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        let line = entries(dir.path(), 512).unwrap_err().to_string();
        assert!(line.contains(words) && !line.contains('\n'), "{line}");
    }
    std::fs::remove_file(path).unwrap();
    let line = entries(dir.path(), 512).unwrap_err().to_string();
    assert!(line.contains("put tokenizer.json there"), "{line}");
}
