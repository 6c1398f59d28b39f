//! Quantized checkpoints as written by other tools: file names, and which linear layers are
//! quantized.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::{Scratch, medi_tiny, refuse, succeed};

/// Makes a branch in which `left_out` stay dense and, with `eight`, the down projections have 8
/// bits.
fn branch(scratch: &Scratch, left_out: &str, eight: bool) -> PathBuf {
    let mut branch =
        "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\ndesc_act = false\n".to_owned();
    if !left_out.is_empty() {
        branch += &format!("[[branch.override]]\nmatch = {left_out:?}\nskip = true\n");
    }
    if eight {
        branch += "[[branch.override]]\nmatch = \"*.mlp.down_proj\"\nbits = 8\n";
    }
    let recipe = scratch.recipe(&medi_tiny(), &branch);
    let flags = ["--device", "cpu", "--samples", "2", "--seq-len", "128"];
    succeed(["quantize", recipe.to_str().unwrap()].iter().chain(&flags));
    scratch.out().join("a")
}

/// Replaces the settings of single linear layers in both configs by a line of JSON, keeping its
/// order.
fn say(dir: &Path, line: &str) {
    for file in ["config.json", "quantize_config.json"] {
        let path = dir.join(file);
        let mut all: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let settings = match file {
            "config.json" => &mut all["quantization_config"],
            _ => &mut all,
        };
        let settings = settings.as_object_mut().unwrap();
        for key in ["dynamic", "modules_in_block_to_quantize"] {
            settings.remove(key);
        }
        settings.insert("HERE".into(), Value::Null);
        let text = serde_json::to_string_pretty(&all).unwrap();
        fs::write(&path, text.replacen("\"HERE\": null", line, 1)).unwrap();
    }
}

fn greedy(dir: &Path) -> Value {
    let fixed = [
        "--prompt",
        "Asthma is",
        "--greedy",
        "--max-new-tokens",
        "12",
        "--json",
    ];
    let line = succeed(["generate", dir.to_str().unwrap()].iter().chain(&fixed));
    serde_json::from_str::<Value>(line.trim()).unwrap()["tokens"].clone()
}

/// Returns the clients that load it according to `inspect`.
fn clients(dir: &Path) -> Vec<String> {
    let text = succeed(["inspect", dir.to_str().unwrap(), "--json"]);
    let found: Value = serde_json::from_str(&text).unwrap();
    let clients = found["clients"].as_array().unwrap().iter();
    let loads = clients.filter(|it| it["loads"] == true);
    loads
        .map(|it| it["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn weights_under_autogptqs_own_names_are_found() {
    let scratch = Scratch::new();
    let dir = branch(&scratch, "", false);
    let expected = greedy(&dir);
    let before = clients(&dir);
    let mut weights = dir.join("model.safetensors");
    let settings = fs::read_to_string(dir.join("quantize_config.json")).unwrap();
    for (name, key) in [
        (
            "gptq_model-4bit-64g.safetensors",
            "\"model_file_base_name\": null",
        ),
        ("mine.safetensors", "\"model_file_base_name\": \"mine\""),
        ("yours.safetensors", "\"model_basename\": \"yours\""),
    ] {
        fs::rename(&weights, dir.join(name)).unwrap();
        weights = dir.join(name);
        let other = dir.join("other.safetensors");
        fs::copy(medi_tiny_weights(), &other).unwrap();
        let own = "\"model_file_base_name\": \"model\"";
        assert!(settings.contains(own), "{settings}");
        fs::write(dir.join("quantize_config.json"), settings.replace(own, key)).unwrap();
        assert_eq!(clients(&dir), before, "{name}");
        assert_eq!(greedy(&dir), expected, "{name}");
        fs::remove_file(other).unwrap();
        succeed(["verify", dir.to_str().unwrap()]);
    }
    // Two files, and nothing that selects one.
    fs::write(dir.join("quantize_config.json"), settings).unwrap();
    fs::copy(medi_tiny_weights(), dir.join("other.safetensors")).unwrap();
    let line = refuse(["verify", dir.to_str().unwrap()]);
    for word in [
        "no checkpoint here",
        "other.safetensors",
        "yours.safetensors",
    ] {
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
}

fn medi_tiny_weights() -> PathBuf {
    crate::harness::root()
        .join(medi_tiny())
        .join("model.safetensors")
}

#[test]
fn linears_that_a_list_leaves_out_are_read_dense() {
    let scratch = Scratch::new();
    let dir = branch(&scratch, "*.k_proj", false);
    let expected = greedy(&dir);
    let lists = r#""modules_in_block_to_quantize": [["self_attn.v_proj", "self_attn.q_proj"],
        ["self_attn.o_proj"], ["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]"#;
    say(&dir, lists);
    assert_eq!(greedy(&dir), expected);
    let verdict = succeed(["verify", dir.to_str().unwrap()]);
    assert!(verdict.contains("18 quantized linear layers"), "{verdict}");
    let loads = clients(&dir);
    assert!(loads.contains(&"Transformers".to_owned()), "{loads:?}");
    assert!(!loads.contains(&"ExLlama".to_owned()), "{loads:?}");
    // Without it the format is unknown.
    say(&dir, "\"lm_head\": false");
    assert_eq!(clients(&dir), [""; 0]);
    let line = refuse(["verify", dir.to_str().unwrap()]);
    for word in ["k_proj.qweight is missing", "k_proj.weight exists"] {
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
}

#[test]
fn the_first_written_of_the_patterns_that_match_counts() {
    let scratch = Scratch::new();
    let dir = branch(&scratch, "*.layers.0.*", true);
    let expected = greedy(&dir);
    // In GPTQModel's order; sorted, the other rule would come first.
    let first = r#""-:.*layers\\.0\\..*": {}"#;
    let second = r#""+:.*down_proj.*": {"bits": 8}"#;
    say(&dir, &format!("\"dynamic\": {{{first}, {second}}}"));
    assert_eq!(greedy(&dir), expected);
    succeed(["verify", dir.to_str().unwrap()]);
    assert!(!clients(&dir).is_empty());
    let around = r#""-:.*layers\\.(?!1|2).*": {}"#;
    say(&dir, &format!("\"dynamic\": {{{around}, {second}}}"));
    assert_eq!(greedy(&dir), expected);
    say(&dir, &format!("\"dynamic\": {{{second}, {first}}}"));
    assert_eq!(clients(&dir), [""; 0]);
    let line = refuse(["verify", dir.to_str().unwrap()]);
    assert!(
        line.contains("layers.0.mlp.down_proj.qweight is missing"),
        "{line}"
    );
}

#[test]
fn a_quantized_model_is_not_quantized_again() {
    let scratch = Scratch::new();
    let dir = branch(&scratch, "", false);
    let again = Scratch::new();
    let recipe = again.recipe(&dir, "[[branch]]\nname = \"a\"\nbits = 4\n");
    let recipe = recipe.to_str().unwrap();
    for command in [
        vec!["plan", recipe],
        vec!["quantize", recipe, "--dry-run"],
        vec!["quantize", recipe],
    ] {
        let line = refuse(&command);
        for word in ["already quantized by gptq", "full-precision model"] {
            assert!(line.contains(word), "no {word:?} in: {line}");
        }
    }
    for file in ["quantize_config.json", "config.json"] {
        let path = dir.join(file);
        let text = fs::read_to_string(&path).unwrap();
        match file {
            "config.json" => fs::write(&path, text.replace("quantization_config", "x")).unwrap(),
            _ => fs::remove_file(&path).unwrap(),
        }
    }
    let line = refuse(["quantize", recipe]);
    assert!(
        line.contains("already quantized") && line.contains("qweight"),
        "{line}"
    );
    again.assert_nothing_written();
}
