//! `gptq verify --against`: sound branches pass at any width, and broken ones fail.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::harness::{Scratch, edit_tensor, gptq, medi_tiny, refuse, succeed};

const TEXT: &str = "tests/data/eval_wikidoc_40.json";
const LINEARS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

fn beside<'a>(dir: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let args = [
        "verify",
        dir.to_str().unwrap(),
        "--text",
        TEXT,
        "--window",
        "512",
        "--against",
        "tests/models/medi-tiny",
    ];
    [&args, more].concat()
}

fn receipts(dir: &Path, more: &[&str]) -> Value {
    let output = gptq(beside(dir, &[&["--json"], more].concat()));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn failed(receipt: &Value) -> Vec<&str> {
    let checks = receipt["checks"].as_array().unwrap().iter();
    let failed = checks.filter(|check| check["pass"] == false);
    failed
        .map(|check| check["name"].as_str().unwrap())
        .collect()
}

/// The tolerance of each of these follows from its own rounding to nearest.
#[test]
fn sound_branches_pass_at_any_width_and_by_any_method() {
    let scratch = Scratch::new();
    let mut branches = String::new();
    for (name, settings) in [
        ("four", "bits = 4\ngroup_size = 64"),
        ("rows", "bits = 4\ngroup_size = -1\ndesc_act = false"),
        ("eight", "bits = 8"),
        ("three", "bits = 3\ngroup_size = 64\npreset = \"best\""),
        ("asymmetric", "bits = 3\ngroup_size = 32\nsym = false"),
        ("two", "bits = 2\ngroup_size = 32\npreset = \"best\""),
        ("plain", "bits = 4\ngroup_size = 32\npreset = \"autogptq\""),
        (
            "mixed",
            "bits = 4\ngroup_size = 64\n[[branch.override]]\nmatch = \"*.1.mlp.down_proj\"\nbits = 2",
        ),
    ] {
        branches += &format!("[[branch]]\nname = {name:?}\n{settings}\n");
    }
    let recipe = scratch.recipe(&medi_tiny(), &branches);
    succeed(["quantize", recipe.to_str().unwrap()]);
    let receipts = receipts(&scratch.out(), &[]);
    let receipts = receipts.as_object().unwrap();
    assert_eq!(receipts.len(), 8);
    for (name, receipt) in receipts {
        assert_eq!(failed(receipt), Vec::<&str>::new(), "{name}: {receipt}");
        let nearest = &receipt["nearest"];
        assert!(nearest["perplexity_increase"].is_f64(), "{name}: {nearest}");
        let text = receipt.to_string();
        assert!(!text.contains("NaN"), "{text}");
    }
    let tolerated = |name: &str| {
        let of = &receipts[name]["tolerances"];
        of["perplexity_increase"].as_f64().unwrap()
    };
    // One linear layer at 2 bits does not raise the tolerance to that of all at 2 bits.
    assert!(tolerated("mixed") < 0.5 * tolerated("two"));
    assert!(tolerated("eight") < tolerated("four") && tolerated("four") < tolerated("two"));
    // Advice is given where it helps.
    let advice = receipts["two"]["advice"].as_str().unwrap();
    for word in ["blocks", "3 or 4 bits", "calibration text"] {
        assert!(advice.contains(word), "{word}: {advice}");
    }
    assert!(!advice.contains("best"), "it is best already: {advice}");
    assert_eq!(receipts["eight"].get("advice"), None);
}

/// Makes a branch without records, so that only its behaviour can reveal faults.
fn unrecorded(scratch: &Scratch, settings: &str) -> PathBuf {
    let recipe = scratch.recipe(
        &medi_tiny(),
        &format!("[[branch]]\nname = \"a\"\n{settings}\n"),
    );
    succeed(["quantize", recipe.to_str().unwrap()]);
    let dir = scratch.out().join("a");
    fs::remove_file(dir.join("report.json")).unwrap();
    dir
}

/// Changes the f16 values of a tensor in place.
fn halves(bytes: &mut [u8], change: impl Fn(usize, f32) -> f32) {
    for (i, bytes) in bytes.chunks_exact_mut(2).enumerate() {
        let value = half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        bytes.copy_from_slice(&half::f16::from_f32(change(i, value)).to_le_bytes());
    }
}

/// Permutes 32-bit words: by a coprime step within a row.
fn shuffle(bytes: &mut [u8]) {
    let words: Vec<[u8; 4]> = bytes
        .chunks_exact(4)
        .map(|w| w.try_into().unwrap())
        .collect();
    for (i, bytes) in bytes.chunks_exact_mut(4).enumerate() {
        bytes.copy_from_slice(&words[i * 37 % words.len()]);
    }
}

/// Scatters groups over the columns.
const ORDER: &str = "desc_act = true\nstatic_groups = false";

fn act_order_is_lost(dir: &Path) {
    let file = dir.join("model.safetensors");
    for layer in 0..3 {
        for linear in LINEARS {
            edit_tensor(
                &file,
                &format!("model.layers.{layer}.{linear}.g_idx"),
                |b| {
                    for (i, bytes) in b.chunks_exact_mut(4).enumerate() {
                        bytes.copy_from_slice(&(i as i32 / 64).to_le_bytes());
                    }
                },
            );
        }
    }
    for file in ["config.json", "quantize_config.json"] {
        let text = fs::read_to_string(dir.join(file)).unwrap();
        let text = text.replace("\"desc_act\": true", "\"desc_act\": false");
        fs::write(dir.join(file), text).unwrap();
    }
}

/// Faults that the files cannot show, but a run beside the dense model does.
#[test]
fn branches_that_are_broken_in_ways_that_no_file_shows_fail() {
    type Damage = Box<dyn Fn(&Path)>;
    let each = |layer: usize, suffix: &'static str, change: fn(&mut [u8])| -> Damage {
        Box::new(move |dir: &Path| {
            for linear in LINEARS {
                let name = format!("model.layers.{layer}.{linear}.{suffix}");
                edit_tensor(&dir.join("model.safetensors"), &name, change);
            }
        })
    };
    let one = |linear: &'static str, change: fn(usize, f32) -> f32| -> Damage {
        Box::new(move |dir: &Path| {
            let name = format!("model.layers.1.{linear}.scales");
            edit_tensor(&dir.join("model.safetensors"), &name, |b| halves(b, change));
        })
    };
    let cases: Vec<(&str, Damage, &str)> = vec![
        (
            "scales of a block, each its neighbour's",
            each(1, "scales", |b| b.rotate_left(2)),
            "blocks",
        ),
        (
            "a shuffled g_idx in a block",
            each(1, "g_idx", shuffle),
            "blocks",
        ),
        ("act order lost", Box::new(act_order_is_lost), "blocks"),
        (
            "a block of zeros",
            each(2, "qweight", |b| b.fill(0x88)),
            "blocks",
        ),
        (
            "one group's scales doubled",
            // Outputs are the last dimension: group 2 of 256 outputs.
            one(
                "self_attn.o_proj",
                |i, s| if i / 256 == 2 { 2.0 * s } else { s },
            ),
            "scales",
        ),
        (
            "one group's scales halved",
            one(
                "mlp.down_proj",
                |i, s| if i / 256 == 7 { 0.5 * s } else { s },
            ),
            "scales",
        ),
        (
            "one output's scales doubled",
            one(
                "mlp.up_proj",
                |i, s| if i % 768 == 100 { 2.0 * s } else { s },
            ),
            "scales",
        ),
    ];
    for bits in [4, 3] {
        let scratch = Scratch::new();
        let dir = unrecorded(
            &scratch,
            &format!("bits = {bits}\ngroup_size = 64\n{ORDER}"),
        );
        let whole: Vec<(PathBuf, Vec<u8>)> =
            ["model.safetensors", "config.json", "quantize_config.json"]
                .map(|name| (dir.join(name), fs::read(dir.join(name)).unwrap()))
                .into();
        assert_eq!(failed(&receipts(&dir, &[])), Vec::<&str>::new());
        for (what, damage, check) in &cases {
            // Zero points of a symmetric 3-bit grid do not repeat bytewise.
            if bits == 3 && what.contains("zeros") {
                continue;
            }
            damage(&dir);
            succeed(["verify", dir.to_str().unwrap(), "--no-receipt"]);
            let receipt = receipts(&dir, &[]);
            assert!(
                failed(&receipt).contains(check),
                "{bits} bits, {what}: {receipt}"
            );
            for (path, bytes) in &whole {
                fs::write(path, bytes).unwrap();
            }
        }
    }
}

#[test]
fn tolerances_can_be_asked_for_and_a_failure_says_what_would_help() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(
        &medi_tiny(),
        "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\npreset = \"standard\"\n",
    );
    succeed(["quantize", recipe.to_str().unwrap()]);
    let dir = scratch.out().join("a");
    let asked = [
        ["--max-perplexity-increase", "0.001"],
        ["--max-kl", "0.001"],
        ["--min-top1", "0.999"],
        ["--max-block-error", "0.001"],
    ];
    let line = refuse(beside(&dir, asked.as_flattened()));
    for word in [
        "rounded to nearest",
        "preset = \"best\"",
        "groups of 32",
        "8 bits",
    ] {
        assert!(line.contains(word), "{word}: {line}");
    }
    let receipt = receipts(&dir, asked.as_flattened());
    assert_eq!(
        failed(&receipt),
        ["perplexity", "KL divergence", "top-1 agreement", "blocks"]
    );
    let receipt = receipts(&dir, &["--max-kl", "7"]);
    assert_eq!(receipt["tolerances"]["kl_divergence"], 7.0);
    assert_eq!(receipt["pass"], true);
}

#[test]
fn a_weaker_check_does_not_hide_a_stronger_one_that_failed() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(
        &medi_tiny(),
        "[[branch]]\nname = \"main\"\nbits = 4\ngroup_size = 64\n",
    );
    succeed(["quantize", recipe.to_str().unwrap()]);
    let (out, dir) = (scratch.out(), scratch.out().join("main"));
    let receipt = || -> Value {
        serde_json::from_slice(&fs::read(dir.join("verify.json")).unwrap()).unwrap()
    };
    let publish = || refuse(["publish", out.to_str().unwrap(), "--repo", "me/medi-GPTQ"]);
    refuse(beside(&dir, &["--max-kl", "0.001"]));
    let plain = gptq(["verify", dir.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&plain.stderr).into_owned();
    assert!(plain.status.success(), "the files themselves hold: {said}");
    assert!(
        said.contains("warning") && said.contains("KL divergence"),
        "{said}"
    );
    let text = [
        "verify",
        dir.to_str().unwrap(),
        "--text",
        TEXT,
        "--window",
        "512",
    ];
    succeed(text);
    assert_eq!(receipt()["pass"], false);
    assert!(receipt()["kl_divergence"].is_f64());
    let line = publish();
    assert!(
        line.contains("did not pass: KL divergence") && line.contains("--against"),
        "{line}"
    );
    // The card reports it too.
    succeed(["card", out.to_str().unwrap(), "--repo", "me/medi-GPTQ"]);
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(
        card.contains("**Failed verification** (KL divergence"),
        "{card}"
    );
    // An equally deep verification replaces it, and a weaker one keeps its results.
    succeed(beside(&dir, &[]));
    succeed(["verify", dir.to_str().unwrap()]);
    assert_eq!(receipt()["pass"], true);
    assert!(receipt()["kl_divergence"].is_f64());
    // Other bytes are verified anew.
    refuse(beside(&dir, &["--max-kl", "0.001"]));
    let config = dir.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text} ")).unwrap();
    succeed(["verify", dir.to_str().unwrap()]);
    assert_eq!(receipt()["pass"], true);
    assert_eq!(receipt()["kl_divergence"], Value::Null);
}

/// `report`, `card` and `publish` read the `verify.json` of a block that adds nothing to its input.
#[test]
fn a_block_that_does_nothing_has_no_relative_error_and_says_so() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    for linear in ["self_attn.o_proj", "mlp.down_proj"] {
        let name = format!("model.layers.1.{linear}.weight");
        edit_tensor(&model.join("model.safetensors"), &name, |b| b.fill(0));
    }
    let recipe = scratch.recipe(
        &model,
        "[[branch]]\nname = \"main\"\nbits = 4\ngroup_size = 64\n",
    );
    succeed(["quantize", recipe.to_str().unwrap()]);
    let (out, dir) = (scratch.out(), scratch.out().join("main"));
    succeed([
        "verify",
        dir.to_str().unwrap(),
        "--text",
        TEXT,
        "--window",
        "512",
        "--against",
        model.to_str().unwrap(),
    ]);
    let path = dir.join("verify.json");
    let receipt: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let block = &receipt["blocks"][1];
    assert_eq!(block.get("relative_error"), None);
    assert!(
        block["reason"].as_str().unwrap().contains("adds nothing"),
        "{block}"
    );
    assert!(!receipt["blocks"].to_string().contains("null"), "{receipt}");
    let read = || {
        let out = out.to_str().unwrap();
        succeed(["report", out]);
        succeed(["card", out, "--repo", "me/medi-GPTQ", "--force"]);
        succeed(["verify", out]);
        let line = refuse(["publish", out, "--repo", "me/medi-GPTQ"]);
        assert!(
            line.contains("HF_TOKEN"),
            "it got as far as the Hub: {line}"
        );
    };
    read();
    // In the old format.
    let mut old = receipt.clone();
    old["blocks"][1] = serde_json::json!({"layer": 1, "relative_error": null});
    fs::write(&path, old.to_string()).unwrap();
    read();
}
