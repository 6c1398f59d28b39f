//! Contents of a branch's files for other programs: precedence of settings, both spellings, and no
//! local paths.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::harness::{Scratch, gptq, refuse, root, succeed};

pub(crate) fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Changes a JSON object in place; `null` removes a key.
pub(crate) fn edit(path: &Path, changes: &Value) {
    let mut object = read(path);
    let entries = object.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        entries.remove(key);
        if !value.is_null() {
            entries.insert(key.clone(), value.clone());
        }
    }
    fs::write(path, object.to_string()).unwrap();
}

/// Returns the bundled model's `config.json` without its rotary settings, and with these keys.
fn rotary(keys: &str) -> Value {
    let mut changes = json!({"rope_parameters": null});
    let keys: Map<String, Value> = serde_json::from_str(keys).unwrap();
    changes.as_object_mut().unwrap().extend(keys);
    changes
}

/// Quantizes `model` to one 4-bit branch, and returns its directory.
pub(crate) fn quantize(scratch: &Scratch, model: &Path, keys: &str) -> PathBuf {
    let recipe = scratch.recipe(
        model,
        &format!("[[branch]]\nname = \"a\"\nbits = 4\n{keys}"),
    );
    succeed([
        "quantize",
        recipe.to_str().unwrap(),
        "--device",
        "cpu",
        "--samples",
        "1",
    ]);
    scratch.out().join("a")
}

#[test]
fn of_two_spellings_that_counts_which_counts_in_transformers() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let original = fs::read(model.join("config.json")).unwrap();
    let texts = read(&root().join("tests/data/eval_wikidoc_40.json"));
    let text = scratch.path("six.json");
    fs::write(&text, json!(texts.as_array().unwrap()[..6]).to_string()).unwrap();
    let llama3 = r#"{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,"#;
    // Perplexities of Transformers 5.23.0 in f32, on the same windows.
    for (keys, expected) in [
        (
            r#"{"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}"#.to_owned(),
            38.31398423,
        ),
        (
            r#"{"rope_theta": 10000.0, "rope_scaling": {"factor": 2.0, "type": "linear", "rope_type": "linear"}}"#
                .to_owned(),
            27.28819194,
        ),
        (
            r#"{"rope_theta": 10000.0, "rope_scaling": {"factor": 2.0, "type": "linear", "rope_type": "default"}}"#
                .to_owned(),
            20.99414107,
        ),
        (
            format!(
                r#"{{"rope_theta": 10000.0, "original_max_position_embeddings": 64,
                     "rope_scaling": {llama3} "original_max_position_embeddings": 512}}}}"#
            ),
            31.28100462,
        ),
    ] {
        fs::write(model.join("config.json"), &original).unwrap();
        edit(&model.join("config.json"), &rotary(&keys));
        let output = gptq([
            "verify",
            model.to_str().unwrap(),
            "--text",
            text.to_str().unwrap(),
            "--window",
            "256",
            "--device",
            "cpu",
            "--json",
        ]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        let value = found["perplexity"]["value"].as_f64().unwrap();
        // Hidden states are kept in f16 between blocks.
        assert!((value / expected - 1.0).abs() < 1e-3, "{keys}: {value}");
    }
}

#[test]
fn a_branch_says_it_in_both_spellings() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let parameters = r#"{"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}"#;
    edit(&model.join("config.json"), &rotary(parameters));
    let written = read(&quantize(&scratch, &model, "").join("config.json"));
    assert_eq!(written["rope_theta"], 500000.0);
    let scaling = json!({"rope_type": "llama3", "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    assert_eq!(written["rope_scaling"], scaling);
    assert_eq!(written["rope_parameters"]["rope_theta"], 500000.0);
    assert_eq!(written["rope_parameters"]["rope_type"], "llama3");
    assert_eq!(
        (&written["dtype"], &written["torch_dtype"]),
        (&json!("float16"), &json!("float16"))
    );
}

#[test]
fn numbers_that_json_has_not_matter_where_they_are_used() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let config = model.join("config.json");
    let original = fs::read_to_string(&config).unwrap();
    let with = |entry: &str| {
        let text = original.trim_start().strip_prefix('{').unwrap();
        fs::write(&config, format!("{{{entry}, {text}")).unwrap();
    };
    with("\"made_by\": {\"loss\": NaN, \"bounds\": [-Infinity, 1e400]}");
    let written = read(&quantize(&scratch, &model, "").join("config.json"));
    let float = |name: &str| json!({"__float__": name});
    let expected = json!({"loss": float("NaN"), "bounds": [float("-Infinity"), float("Infinity")]});
    assert_eq!(written["made_by"], expected);
    let recipe = scratch.path("recipe.toml");
    for (from, to, words) in [
        ("1e-05", "NaN", "rms_norm_eps: NaN is not a number"),
        (
            "10000.0",
            "Infinity",
            "rope_parameters.rope_theta: Infinity is not a number",
        ),
        (
            "\"attention_bias\": false",
            "\"attention_bias\": null",
            "attention_bias: null is not true or false",
        ),
    ] {
        assert!(original.contains(from), "{from}");
        fs::write(&config, original.replace(from, to)).unwrap();
        let line = refuse(["plan", recipe.to_str().unwrap()]);
        assert!(
            line.contains("config.json") && line.contains(words),
            "{line}"
        );
    }
}

/// Returns every file below a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found
}

#[test]
fn nothing_of_the_makers_machine_is_in_a_branch() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let here = |name: &str| scratch.path(name).to_str().unwrap().to_owned();
    edit(
        &model.join("config.json"),
        &json!({"_name_or_path": here("model"), "trained_with": {"data": [here("rows.json")], here("x/y"): 1},
                "command": format!("train --out={} --from ~/base", here("run-7"))}),
    );
    edit(
        &model.join("tokenizer_config.json"),
        &json!({"name_or_path": "/home/someone/secret-project/llama", "tokenizer_file": here("model/tokenizer.json"),
                "cache": "C:\\Users\\someone\\cache"}),
    );
    edit(
        &model.join("generation_config.json"),
        &json!({"_from": here("model/generation_config.json")}),
    );
    let (rows, text) = (scratch.path("rows.json"), scratch.path("held-out.json"));
    let calibration = root().join("calibration/wikidoc/wikidoc_patient_information_1000.json");
    fs::copy(calibration, &rows).unwrap();
    fs::copy(root().join("tests/data/eval_wikidoc_40.json"), &text).unwrap();
    let branch = "[[branch]]\nname = \"a\"\nbits = 4\n";
    let recipe = scratch.recipe(&model, branch);
    let own = fs::read_to_string(&recipe).unwrap();
    let own = own.replace(
        "calibration/wikidoc/wikidoc_patient_information_1000.json",
        rows.to_str().unwrap(),
    );
    let comment = format!(
        "# from {}\n[evaluation]\ntext = {text:?}\nwindow = 256\n",
        scratch.path("recipe.toml").display()
    );
    fs::write(&recipe, format!("{own}\n{comment}")).unwrap();
    succeed([
        "quantize",
        recipe.to_str().unwrap(),
        "--device",
        "cpu",
        "--samples",
        "1",
        "--scratch",
        &here(""),
        "--log-file",
        &here("log.txt"),
    ]);
    let dir = scratch.out().join("a");
    succeed([
        "verify",
        dir.to_str().unwrap(),
        "--text",
        text.to_str().unwrap(),
        "--window",
        "256",
    ]);
    let home = std::env::var("HOME").unwrap_or("/root".into());
    let directories = [
        here("").trim_end_matches('/').to_owned(),
        root().canonicalize().unwrap().to_str().unwrap().to_owned(),
        home,
        "/home/someone".to_owned(),
        "secret-project".to_owned(),
        "Users".to_owned(),
        "~/".to_owned(),
    ];
    let all = files(&dir);
    assert!(all.len() >= 9, "{all:?}");
    for file in all {
        let bytes = fs::read(&file).unwrap();
        for word in &directories {
            // For weights, the part before the first tensor.
            let end = match file.extension().is_some_and(|end| end == "safetensors") {
                true => 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize,
                false => bytes.len(),
            };
            let there = bytes[..end]
                .windows(word.len())
                .any(|it| it == word.as_bytes());
            // A tokenizer's words are not local paths.
            let tokenizer = file.ends_with("tokenizer.json") && word.len() < 10;
            assert!(!there || tokenizer, "{}: {word}", file.display());
        }
    }
    let config = read(&dir.join("config.json"));
    assert_eq!(config["trained_with"], json!({"data": ["rows.json"]}));
    assert_eq!(config["command"], "train --out=run-7 --from base");
}

#[test]
fn licences_templates_and_tokenizers_go_along_and_code_does_not() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    fs::create_dir(model.join("additional_chat_templates")).unwrap();
    let along = [
        "LICENSE.txt",
        "Notice.txt",
        "THIRD_PARTY_NOTICES.md",
        "USE_POLICY.md",
        "tekken.json",
        "tokenizer.model.v3",
        "additional_chat_templates/tool_use.jinja",
    ];
    for name in along {
        fs::write(model.join(name), format!("\"{name}\"")).unwrap();
    }
    for name in ["modeling_x.py", "configuration_x.py", "README.md"] {
        fs::write(model.join(name), "print()").unwrap();
    }
    let auto =
        json!({"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"});
    edit(
        &model.join("config.json"),
        &json!({"auto_map": auto, "pretraining_tp": 2}),
    );
    let recipe = scratch.recipe(&model, "[[branch]]\nname = \"a\"\nbits = 4\n");
    let output = gptq([
        "quantize",
        recipe.to_str().unwrap(),
        "--device",
        "cpu",
        "--samples",
        "1",
    ]);
    let warnings = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{warnings}");
    assert!(
        warnings.contains("auto_map") && warnings.contains("pretraining_tp = 2"),
        "{warnings}"
    );
    let dir = scratch.out().join("a");
    for name in along {
        assert_eq!(
            fs::read(dir.join(name)).unwrap(),
            fs::read(model.join(name)).unwrap(),
            "{name}"
        );
    }
    for name in ["modeling_x.py", "configuration_x.py", "README.md"] {
        assert!(!dir.join(name).exists(), "{name}");
    }
    let config = read(&dir.join("config.json"));
    assert_eq!(
        (config.get("auto_map"), &config["pretraining_tp"]),
        (None, &json!(1))
    );
    // They are verified, and therefore published.
    succeed(["verify", dir.to_str().unwrap()]);
    let receipt = read(&dir.join("verify.json"));
    assert!(
        receipt["files"]
            .get("additional_chat_templates/tool_use.jinja")
            .is_some(),
        "{receipt}"
    );
}
