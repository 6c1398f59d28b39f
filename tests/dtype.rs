//! `dtype = "bf16"`: weights that f16 cannot hold, from the recipe to the finished branch.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gptq_format::{Checkpoint, Half, ShardedWriter, TensorSpec};
use half::bf16;
use safetensors::Dtype;
use serde_json::Value;

use crate::harness::{Scratch, edit_tensor, medi_tiny, refuse, root, succeed};

const ONE: &str = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\n";

/// Makes the bundled model in bf16, in `model/`.
fn bf16_model(scratch: &Scratch) -> PathBuf {
    let model = scratch.copy_model();
    let base = Checkpoint::open(&root().join(medi_tiny())).unwrap();
    let spec = |name: &str| TensorSpec {
        name: name.into(),
        dtype: Dtype::BF16,
        shape: base.view(name).unwrap().shape.into(),
    };
    let specs: Vec<TensorSpec> = base.names().map(spec).collect();
    fs::remove_file(model.join("model.safetensors")).unwrap();
    let writer = ShardedWriter::create(&model, &specs, None).unwrap();
    for spec in &specs {
        let mut halves = vec![0; spec.shape.iter().product()];
        base.halves_into(Half::Bf16, &spec.name, &spec.shape, &mut halves)
            .unwrap();
        let bytes: Vec<u8> = halves.iter().flat_map(|half| half.to_le_bytes()).collect();
        writer.write(&spec.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    let config = config.replace("\"float16\"", "\"bfloat16\"");
    fs::write(model.join("config.json"), config).unwrap();
    model
}

/// Sets the first element of a tensor of `model`.
fn enlarge(model: &Path, tensor: &str, value: f32) {
    edit_tensor(&model.join("model.safetensors"), tensor, |bytes| {
        bytes[..2].copy_from_slice(&bf16::from_f32(value).to_le_bytes());
    });
}

/// Writes a recipe that loads `model` in `dtype`.
fn recipe(scratch: &Scratch, model: &Path, dtype: &str, branches: &str) -> String {
    let path = scratch.recipe(model, branches);
    let text = fs::read_to_string(&path).unwrap();
    let text = text.replace("[model]\n", &format!("[model]\ndtype = {dtype:?}\n"));
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn quantize(recipe: &str) -> Vec<&str> {
    vec!["quantize", recipe, "--device", "cpu", "--samples", "2"]
}

/// Returns the perplexities of a branch and of `against`, checking that each block has an error.
fn perplexities(branch: &Path, against: &Path) -> [f64; 2] {
    let [branch_name, against] = [branch, against].map(|path| path.to_str().unwrap());
    succeed([
        "verify",
        branch_name,
        "--text",
        "tests/data/eval_wikidoc_40.json",
        "--window",
        "512",
        "--against",
        against,
    ]);
    let receipt = fs::read(branch.join("verify.json")).unwrap();
    let receipt: Value = serde_json::from_slice(&receipt).unwrap();
    assert_eq!(receipt["pass"], true, "{receipt}");
    ["value", "dense"].map(|key| receipt["perplexity"][key].as_f64().unwrap())
}

fn dtypes(checkpoint: &Checkpoint) -> BTreeMap<&str, Dtype> {
    let dtype = |name| (name, checkpoint.view(name).unwrap().dtype);
    checkpoint.names().map(dtype).collect()
}

#[test]
fn a_bf16_recipe_keeps_the_weights_that_stay_and_measures_as_f16_does() {
    let scratch = Scratch::new();
    let model = bf16_model(&scratch);
    let branch = scratch.out().join("a");
    succeed(quantize(&recipe(&scratch, &model, "bf16", ONE)));

    let base = Checkpoint::open(&model).unwrap();
    let made = Checkpoint::open(&branch).unwrap();
    for (name, dtype) in dtypes(&made) {
        let expected = match name.rsplit('.').next().unwrap() {
            "qweight" | "qzeros" | "g_idx" => Dtype::I32,
            "scales" => Dtype::F16,
            _ => Dtype::BF16,
        };
        assert_eq!(dtype, expected, "{name}");
        if dtype == Dtype::BF16 {
            let (a, b) = (base.view(name).unwrap(), made.view(name).unwrap());
            assert_eq!(a.bytes(), b.bytes(), "{name}");
        }
    }
    let config = fs::read(branch.join("config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["dtype"], "bfloat16");
    let inspected = succeed(["inspect", branch.to_str().unwrap(), "--json"]);
    assert!(inspected.contains("BF16"), "{inspected}");

    let [bf16, dense_bf16] = perplexities(&branch, &model);
    let prompt = [
        "generate",
        branch.to_str().unwrap(),
        "--prompt",
        "Asthma is",
    ];
    let more = ["--greedy", "--max-new-tokens", "8", "--device", "cpu"];
    let text = succeed(prompt.iter().chain(&more));
    assert!(text.trim().len() > "Asthma is".len(), "{text}");

    // f16 holds these weights except subnormal ones: the two computations are almost equal.
    succeed(
        quantize(&recipe(&scratch, &model, "f16", ONE))
            .iter()
            .chain(&["--restart"]),
    );
    let made = Checkpoint::open(&branch).unwrap();
    assert!(dtypes(&made).values().all(|d| *d != Dtype::BF16));
    let [f16, dense_f16] = perplexities(&branch, &model);
    let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-3;
    assert!(close(bf16, f16), "{bf16} and {f16}");
    assert!(close(dense_bf16, dense_f16), "{dense_bf16} and {dense_f16}");
}

#[test]
fn a_weight_beyond_f16_is_refused_in_f16_and_kept_in_bf16() {
    let scratch = Scratch::new();
    let model = bf16_model(&scratch);
    let refused = |tensor: &str| {
        enlarge(&model, tensor, 1e5);
        let line = refuse(quantize(&recipe(&scratch, &model, "f16", ONE)));
        assert!(
            line.contains(tensor) && line.contains("holds 1 value(s) too large for f16"),
            "{line}"
        );
        assert!(line.contains("dtype = \"bf16\""), "{line}");
        scratch.assert_nothing_written();
    };
    refused("model.layers.0.self_attn.q_proj.weight");
    enlarge(&model, "model.layers.0.self_attn.q_proj.weight", 0.01);
    // The row of the unknown token, which does not occur in texts.
    refused("model.embed_tokens.weight");
    succeed(quantize(&recipe(&scratch, &model, "bf16", ONE)));
    let branch = scratch.out().join("a");
    let made = Checkpoint::open(&branch).unwrap();
    let row = made.view("model.embed_tokens.weight").unwrap().bytes();
    assert_eq!(row[..2], bf16::from_f32(1e5).to_le_bytes());
    let [value, dense] = perplexities(&branch, &model);
    assert!(value.is_finite() && dense.is_finite());
}

#[test]
fn a_scale_beyond_f16_is_refused_by_name() {
    let scratch = Scratch::new();
    let model = bf16_model(&scratch);
    enlarge(&model, "model.layers.0.self_attn.q_proj.weight", 1e9);
    let line = refuse(quantize(&recipe(&scratch, &model, "bf16", ONE)));
    assert!(
        line.contains("tensor model.layers.0.self_attn.q_proj.scales: a scale reaches 65504"),
        "{line}"
    );
    // Follow the advice of the line.
    let skipped =
        format!("{ONE}[[branch.override]]\nmatch = \"*.0.self_attn.q_proj\"\nskip = true\n");
    succeed(quantize(&recipe(&scratch, &model, "bf16", &skipped)));
}

#[test]
fn a_finished_branch_of_another_dtype_is_named() {
    let scratch = Scratch::new();
    let f16 = recipe(&scratch, &medi_tiny(), "f16", ONE);
    succeed(quantize(&f16));
    let bf16 = recipe(&scratch, &medi_tiny(), "bfloat16", ONE);
    let line = refuse(quantize(&bf16));
    assert!(
        line.contains("model.dtype was \"f16\", is \"bf16\""),
        "{line}"
    );
}
