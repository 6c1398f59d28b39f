//! `gptq inspect` on other tools' checkpoints, which `verify` and `generate` read too.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{Scratch, edit_tensor, medi_tiny, root, succeed};

/// Tensors by name, in order: dtype, shape, bytes.
pub(crate) type Tensors = Vec<(String, (Value, Value, Vec<u8>))>;

pub(crate) fn read(file: &Path) -> Tensors {
    let raw = fs::read(file).unwrap();
    let n = u64::from_le_bytes(raw[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&raw[8..8 + n]).unwrap();
    let tensors = header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__");
    tensors
        .map(|(name, t)| {
            let at = |i: usize| t["data_offsets"][i].as_u64().unwrap() as usize + 8 + n;
            (
                name,
                (
                    t["dtype"].clone(),
                    t["shape"].clone(),
                    raw[at(0)..at(1)].to_vec(),
                ),
            )
        })
        .collect()
}

pub(crate) fn write(file: &Path, tensors: &Tensors) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (dtype, shape, bytes)) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(
            name.clone(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}),
        );
        data.extend_from_slice(bytes);
    }
    let text = Value::Object(header).to_string();
    let length = (text.len() as u64).to_le_bytes();
    fs::write(file, [&length[..], text.as_bytes(), &data].concat()).unwrap();
}

/// Makes medi-tiny as written by GPTQModel: the recorded linear layers with medi-tiny's other
/// tensors.
pub(crate) fn gptqmodel_branch(scratch: &Scratch) -> PathBuf {
    let golden = root().join("tests/golden/gptqmodel_w4g128-act");
    let base = root().join(medi_tiny());
    let mut tensors = read(&golden.join("linears.safetensors"));
    let dense = read(&base.join("model.safetensors"));
    tensors.extend(
        dense
            .into_iter()
            .filter(|(name, _)| !name.contains("_proj.")),
    );
    let dir = scratch.path("gptqmodel");
    fs::create_dir(&dir).unwrap();
    write(&dir.join("model.safetensors"), &tensors);
    for file in ["config.json", "quantize_config.json"] {
        fs::copy(golden.join(file), dir.join(file)).unwrap();
    }
    for file in [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        fs::copy(base.join(file), dir.join(file)).unwrap();
    }
    dir
}

fn inspect(path: &Path) -> Value {
    let text = succeed(["inspect", path.to_str().unwrap(), "--json"]);
    serde_json::from_str(&text).unwrap()
}

fn greedy(dir: &Path) -> Value {
    let fixed = [
        "--prompt",
        "Asthma is",
        "--greedy",
        "--max-new-tokens",
        "16",
        "--json",
    ];
    let line = succeed(["generate", dir.to_str().unwrap()].iter().chain(&fixed));
    serde_json::from_str::<Value>(line.trim()).unwrap()["tokens"].clone()
}

#[test]
fn a_branch_of_gptqmodel_is_understood_passes_and_speaks() {
    let scratch = Scratch::new();
    let dir = gptqmodel_branch(&scratch);
    let found = inspect(&dir);
    assert_eq!(found["format"], "gptq");
    assert_eq!(found["settings"]["bits"], 4);
    assert_eq!(found["settings"]["group_size"], 128);
    assert_eq!(found["settings"]["act_order"], true);
    assert_eq!(found["linears"].as_array().unwrap().len(), 21);
    let clients = found["clients"].as_array().unwrap().iter();
    let refusing: Vec<&Value> = clients
        .filter(|c| c["loads"] == false)
        .map(|c| &c["name"])
        .collect();
    assert_eq!(
        refusing,
        ["AutoRound", "vLLM", "OpenVINO", "mlx-lm", "mistral.rs"],
        "they take no act order, or other formats"
    );
    let screen = succeed(["inspect", dir.to_str().unwrap()]);
    assert!(
        screen.contains("4 bits, groups of 128, symmetric, act order"),
        "{screen}"
    );
    assert!(screen.lines().count() < 40, "one screen: {screen}");

    let verdict = succeed(["verify", dir.to_str().unwrap()]);
    assert!(verdict.contains("not recorded"), "{verdict}");
    assert_eq!(greedy(&dir).as_array().unwrap().len(), 16);
}

#[test]
fn a_file_by_itself_tells_its_settings_from_its_tensors() {
    let file = root().join("tests/golden/gptqmodel_w4g128-act/linears.safetensors");
    let scratch = Scratch::new();
    let alone = scratch.path("anything.safetensors");
    fs::copy(&file, &alone).unwrap();
    let found = inspect(&alone);
    assert_eq!(found["settings"]["source"], "tensors");
    assert_eq!(
        (&found["settings"]["bits"], &found["format"]),
        (&json!(4), &json!("gptq"))
    );
    assert_eq!(found["settings"]["group_size"], 128);
    assert_eq!(found["settings"]["sym"], true);

    let dense = inspect(&root().join(medi_tiny()));
    assert_eq!(
        (&dense["format"], &dense["settings"]),
        (&json!("dense"), &Value::Null)
    );
    let sum = dense["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["bytes"].as_u64().unwrap());
    assert_eq!(dense["tensor_bytes"], json!(sum.sum::<u64>()));
}

#[test]
fn files_without_g_idx_and_configs_in_one_place_read_the_same() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(
        &medi_tiny(),
        "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\ndesc_act = false\n",
    );
    succeed(["quantize", recipe.to_str().unwrap()]);
    let dir = scratch.out().join("a");
    let expected = greedy(&dir);
    let file = dir.join("model.safetensors");
    let mut tensors = read(&file);
    tensors.retain(|(name, _)| !name.ends_with(".g_idx"));
    write(&file, &tensors);
    fs::remove_file(dir.join("quantize_config.json")).unwrap();
    assert_eq!(greedy(&dir), expected);
    let found = inspect(&dir);
    assert_eq!(found["settings"]["source"], "config.json");
    assert_eq!(found["settings"]["without_g_idx"], 21);
    succeed(["verify", dir.to_str().unwrap()]);

    // The same codes with version 2's zero points, stored unchanged.
    for (name, _) in &tensors {
        if name.ends_with(".qzeros") {
            edit_tensor(&file, name, |bytes| bytes.fill(0x88));
        }
    }
    let config = fs::read_to_string(dir.join("config.json")).unwrap();
    let config = config.replace(
        "\"checkpoint_format\": \"gptq\"",
        "\"checkpoint_format\": \"gptq_v2\"",
    );
    fs::write(dir.join("config.json"), config).unwrap();
    assert_eq!(inspect(&dir)["format"], "gptq_v2");
    assert_eq!(greedy(&dir), expected);
}

#[test]
fn a_directory_of_branches_is_one_table() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(
        &medi_tiny(),
        "[[branch]]\nname = \"wide\"\nbits = 8\ngroup_size = -1\n\
         [[branch]]\nname = \"main\"\nbits = 4\ngroup_size = 64\nsym = false\n",
    );
    succeed(["quantize", recipe.to_str().unwrap()]);
    let out = scratch.out();
    let table = succeed(["inspect", out.to_str().unwrap()]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 3, "{table}");
    assert!(
        lines[0].starts_with("branch") && lines[1].starts_with("main"),
        "{table}"
    );
    let size = fs::metadata(out.join("wide/model.safetensors"))
        .unwrap()
        .len();
    for word in [
        "8",
        "-1",
        &format!("{:.2} MB", size as f64 / 1e6),
        "GPTQModel",
    ] {
        assert!(lines[2].contains(word), "{word}: {table}");
    }
    let found = inspect(&out);
    assert_eq!(found["main"], inspect(&out.join("main")));
    assert_eq!(found["wide"]["settings"]["bits"], 8);
    // No checkpoint in the directory or below it.
    let line = crate::harness::refuse(["inspect", "tests/data"]);
    assert!(line.contains("tests/data"), "{line}");
}
