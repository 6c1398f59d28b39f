//! `gptq verify` finds overflows in f16 programs, although it computes in f32.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::{Scratch, edit_tensor, gptq, medi_tiny, succeed};

const ONE: &str = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\n";

/// Scales the rows of rotary pair 2 of each head, of 64 values, in a matrix of 16-bit floats with
/// `n_in` columns.
fn pair(bytes: &mut [u8], n_in: usize, heads: usize, factor: f32) {
    for head in 0..heads {
        for row in [head * 64 + 2, head * 64 + 34] {
            scale(&mut bytes[2 * row * n_in..2 * (row + 1) * n_in], factor);
        }
    }
}

fn scale(bytes: &mut [u8], factor: f32) {
    for bytes in bytes.chunks_exact_mut(2) {
        let value = half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        bytes.copy_from_slice(&half::f16::from_f32(factor * value).to_le_bytes());
    }
}

fn receipt(dir: &Path, against: Option<&Path>) -> Value {
    let text = "tests/data/eval_wikidoc_40.json";
    let mut args = vec!["verify", dir.to_str().unwrap(), "--json", "--text", text];
    args.extend(["--window", "256"]);
    args.extend(
        against
            .iter()
            .flat_map(|m| ["--against", m.to_str().unwrap()]),
    );
    serde_json::from_slice(&gptq(args).stdout).unwrap()
}

fn check<'a>(receipt: &'a Value, name: &str) -> &'a Value {
    let checks = receipt["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap()
}

/// Queries 2^14 times as large in one rotary pair and keys 2^14 times as small: the same attention,
/// but in Transformers with f16 all 1 048 576 logits of 256 tokens are NaN.
#[test]
fn queries_beyond_the_range_are_found_and_whose_they_are_is_said() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let edit = |linear: &str, heads: usize, factor: f32| {
        let name = format!("model.layers.0.self_attn.{linear}.weight");
        edit_tensor(&model.join("model.safetensors"), &name, |b| {
            pair(b, 256, heads, factor)
        });
    };
    edit("q_proj", 2, 16384.0);
    edit("k_proj", 1, 1.0 / 16384.0);
    let recipe = scratch.recipe(&model, ONE);
    let text = "tests/data/eval_wikidoc_40.json";
    let run = gptq(["quantize", recipe.to_str().unwrap(), "--perplexity", text]);
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success(), "{said}");
    assert!(said.contains("warning: a: queries of block 0"), "{said}");
    let dir = scratch.out().join("a");

    let found = receipt(&dir, Some(&model));
    assert_eq!(found["pass"], false);
    let detail = check(&found, "f16")["detail"].as_str().unwrap();
    for word in [
        "queries of block 0 reach",
        "beyond f16's 65504",
        "the dense model has them too",
        "dtype = \"bf16\"",
    ] {
        assert!(detail.contains(word), "{word}: {detail}");
    }
    let first = &found["range"]["overflows"][0];
    assert_eq!(
        (&first["layer"], &first["dense"]),
        (&0.into(), &true.into())
    );
    assert!(first["largest"].as_f64().unwrap() > 65504.0 && first["values"].as_u64() > Some(0));
    // In f32 it equals the dense model.
    assert_eq!(check(&found, "perplexity")["pass"], true);

    // Compared with the original model, only the branch cannot be run.
    let found = receipt(&dir, Some(&medi_tiny()));
    let detail = check(&found, "f16")["detail"].as_str().unwrap();
    assert!(
        detail.contains("the dense model has none there"),
        "{detail}"
    );
    let detail = receipt(&dir, None)["checks"].to_string();
    assert!(
        detail.contains("use --against MODEL to see whether"),
        "{detail}"
    );

    // bf16 holds all values.
    let config = dir.join("config.json");
    let bf16 = fs::read_to_string(&config)
        .unwrap()
        .replace("\"float16\"", "\"bfloat16\"");
    fs::write(&config, bf16).unwrap();
    let found = receipt(&dir, None);
    assert_eq!(check(&found, "f16")["pass"], true);
    let detail = check(&found, "f16")["detail"].as_str().unwrap();
    assert!(detail.contains("bf16, which config.json names"), "{detail}");
}

/// An overflow inside a block: `up_proj` 2^15 times as large and `down_proj` much smaller.
#[test]
fn states_beyond_the_range_inside_a_block_are_found() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    succeed(["quantize", recipe.to_str().unwrap()]);
    let dir = scratch.out().join("a");
    let sound = receipt(&dir, Some(&medi_tiny()));
    assert_eq!(sound["pass"], true, "{sound}");
    let range = &sound["range"];
    assert!(
        range["largest"].as_f64().unwrap() < 65504.0 && range["overflows"] == Value::Array(vec![])
    );
    fs::remove_file(dir.join("report.json")).unwrap();
    let file = dir.join("model.safetensors");
    for (linear, factor) in [("up_proj", 32768.0), ("down_proj", 1.0 / 4096.0)] {
        let name = format!("model.layers.1.mlp.{linear}.scales");
        edit_tensor(&file, &name, |b| scale(b, factor));
    }
    let found = receipt(&dir, Some(&medi_tiny()));
    assert_eq!(check(&found, "f16")["pass"], false, "{found}");
    let overflows = found["range"]["overflows"].as_array().unwrap();
    let places: Vec<&str> = overflows
        .iter()
        .map(|o| o["what"].as_str().unwrap())
        .collect();
    assert!(places.contains(&"outputs of up_proj"), "{places:?}");
    assert!(
        overflows
            .iter()
            .all(|o| o["layer"] == 1 && o["dense"] == false),
        "{overflows:?}"
    );
}
