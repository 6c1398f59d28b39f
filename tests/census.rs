//! Checkpoints that deviate from their config: those that are read all the same, and those that are
//! refused before any work. Perplexities are those of Transformers 5.23 in f32 on the same windows.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{Scratch, edit_tensor, gptq, refuse, refused, root, succeed};
use crate::inspect::{Tensors, read, write};
use crate::resume::{SLOW, quantize};

const WEIGHTS: &str = "model.safetensors";
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";
const ONE: &str = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\n";
/// Perplexities of medi-tiny with its own head, and with its embedding as head.
const OWN_HEAD: f64 = 23.79684;
const TIED: f64 = 9011.0719;

/// medi-tiny with changes.
struct Variant {
    scratch: Scratch,
    model: PathBuf,
}

impl Variant {
    fn new() -> Self {
        let scratch = Scratch::new();
        let model = scratch.copy_model();
        Variant { scratch, model }
    }

    fn config(self, key: &str, value: Value) -> Self {
        let path = self.model.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        self
    }

    fn tensors(self, change: impl FnOnce(&mut Tensors)) -> Self {
        let path = self.model.join(WEIGHTS);
        let mut tensors = read(&path);
        change(&mut tensors);
        write(&path, &tensors);
        self
    }

    /// Adds an f16 tensor with all elements `value`.
    fn with(self, name: &str, shape: &[usize], value: f32) -> Self {
        let n = shape.iter().product();
        let bytes = vec![half::f16::from_f32(value); n];
        let bytes = bytes.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensors(|all| all.push((name.into(), (json!("F16"), json!(shape), bytes))))
    }

    fn recipe(&self) -> PathBuf {
        self.scratch.recipe(&self.model, ONE)
    }

    fn dir(&self) -> &str {
        self.model.to_str().unwrap()
    }

    /// Returns the warnings of `plan`.
    fn planned(&self) -> String {
        let output = gptq(["plan", self.recipe().to_str().unwrap()]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        said
    }

    /// Checks that every command that opens the model refuses it in one line with these words,
    /// before any work.
    fn refused(&self, words: &[&str]) {
        let recipe = self.recipe();
        let recipe = recipe.to_str().unwrap();
        let prompt = ["--prompt", "Asthma", "--max-new-tokens", "1"];
        for command in [
            vec!["plan", recipe],
            vec!["quantize", recipe, "--dry-run"],
            vec!["quantize", recipe],
            vec!["verify", self.dir()],
            [&["generate", self.dir()][..], &prompt].concat(),
        ] {
            let line = refuse(&command);
            for word in words {
                assert!(line.contains(word), "{command:?}: no {word:?} in: {line}");
            }
        }
        self.scratch.assert_nothing_written();
    }

    /// Returns its perplexity from `verify`, with every check passed.
    fn perplexity(&self) -> f64 {
        perplexity(&self.scratch, &self.model)
    }
}

/// Measures the first twelve texts, in windows of 256.
fn perplexity(scratch: &Scratch, dir: &Path) -> f64 {
    let all = fs::read(root().join("tests/data/eval_wikidoc_40.json")).unwrap();
    let all: Vec<String> = serde_json::from_slice(&all).unwrap();
    let text = scratch.path("text.json");
    fs::write(&text, json!(all[..12]).to_string()).unwrap();
    let (dir, text) = (dir.to_str().unwrap(), text.to_str().unwrap());
    let receipt = succeed([
        "verify",
        dir,
        "--text",
        text,
        "--window",
        "256",
        "--device",
        "cpu",
        "--no-receipt",
        "--json",
    ]);
    let receipt: Value = serde_json::from_str(&receipt).unwrap();
    assert_eq!(receipt["perplexity"]["tokens"], 1020);
    receipt["perplexity"]["value"].as_f64().unwrap()
}

/// Both are f32, with f16 weights and different orders of summation.
fn assert_near(found: f64, expected: f64) {
    assert!(
        (found / expected - 1.0).abs() < 1e-4,
        "{found}, not {expected}"
    );
}

#[test]
fn a_head_of_its_own_is_used_and_kept_whatever_the_flag_says() {
    let variant = Variant::new().config("tie_word_embeddings", json!(true));
    let said = variant.planned();
    assert!(
        said.contains("warning:") && said.contains("lm_head.weight differs"),
        "{said}"
    );
    assert_near(variant.perplexity(), OWN_HEAD);
    succeed([
        "quantize",
        variant.recipe().to_str().unwrap(),
        "--device",
        "cpu",
    ]);
    let branch = variant.scratch.out().join("a");
    let config: Value =
        serde_json::from_slice(&fs::read(branch.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
    let head = |file: PathBuf| read(&file).into_iter().find(|(name, _)| name == HEAD);
    assert!(head(branch.join(WEIGHTS)) == head(variant.model.join(WEIGHTS)));
    let found = perplexity(&variant.scratch, &branch);
    assert!((found / OWN_HEAD - 1.0).abs() < 0.1, "{found}");
}

#[test]
fn a_tied_model_may_have_either_name_or_both() {
    let tied = || Variant::new().config("tie_word_embeddings", json!(true));
    let embedding = |all: &Tensors| all.iter().find(|(n, _)| n == EMBEDDING).unwrap().1.clone();
    let both = tied().tensors(|all| {
        let own = embedding(all);
        all.iter_mut().find(|(name, _)| name == HEAD).unwrap().1 = own;
    });
    let without = |gone: &'static str| {
        let all = read(&both.model.join(WEIGHTS));
        tied().tensors(|new| *new = all.into_iter().filter(|(name, _)| name != gone).collect())
    };
    for variant in [&both, &without(HEAD), &without(EMBEDDING)] {
        assert!(
            !variant.planned().contains("warning"),
            "{}",
            variant.planned()
        );
        assert_near(variant.perplexity(), TIED);
    }
    let branches = [&both, &without(EMBEDDING)].map(|variant| {
        succeed([
            "quantize",
            variant.recipe().to_str().unwrap(),
            "--device",
            "cpu",
        ]);
        let tensors = read(&variant.scratch.out().join("a").join(WEIGHTS));
        assert!(tensors.iter().all(|(name, _)| name != HEAD));
        tensors
    });
    assert!(branches[0] == branches[1]);
}

#[test]
fn a_head_that_is_missing_is_refused_with_the_flag_that_would_do_without_it() {
    let variant = Variant::new().tensors(|all| all.retain(|(name, _)| name != HEAD));
    variant.refused(&[
        "tensor lm_head.weight is missing",
        "\"tie_word_embeddings\": true",
    ]);
    let variant = Variant::new().tensors(|all| all.retain(|(name, _)| name != EMBEDDING));
    variant.refused(&[
        "embed_tokens.weight is missing",
        "\"tie_word_embeddings\": true",
    ]);
    // A head for another vocabulary is separate, and does not fit.
    let variant = Variant::new()
        .config("tie_word_embeddings", json!(true))
        .tensors(|all| all.retain(|(name, _)| name != HEAD))
        .with(HEAD, &[4000, 256], 0.1);
    variant.refused(&["lm_head.weight has shape [4000, 256], expected [4096, 256]"]);
}

#[test]
fn tensors_without_which_it_would_be_another_model_are_refused_by_name() {
    let block = "model.layers.0.self_attn";
    for (name, shape, words) in [
        (
            format!("{block}.q_proj.bias"),
            vec![256],
            ["q_proj.bias", "attention_bias"],
        ),
        (
            format!("{block}.q_norm.weight"),
            vec![32],
            ["q_norm.weight", "another"],
        ),
        (
            format!("{block}.sinks"),
            vec![8],
            ["self_attn.sinks", "another"],
        ),
        (
            "model.layers.3.mlp.up_proj.weight".into(),
            vec![768, 256],
            ["block 3", "num_hidden_layers = 3"],
        ),
        (
            format!("base_model.model.{block}.q_proj.lora_A.weight"),
            vec![8, 256],
            ["lora_A", "merge"],
        ),
        (
            "lm_head.bias".into(),
            vec![4096],
            ["lm_head.bias", "not zero"],
        ),
        (
            "model.norm.bias".into(),
            vec![256],
            ["model.norm.bias", "not zero"],
        ),
    ] {
        Variant::new().with(&name, &shape, 1.0).refused(&words);
    }
}

#[test]
fn tensors_that_change_nothing_are_left_out_and_named_where_they_are_of_another_part() {
    let quiet = Variant::new()
        .with("model.layers.0.self_attn.q_proj.bias", &[256], 0.0)
        .with("model.layers.1.mlp.down_proj.bias", &[256], -0.0)
        .with("model.layers.0.self_attn.rotary_emb.inv_freq", &[16], 1.0)
        .with("model.layers.2.self_attn.masked_bias", &[1], -1e4);
    assert!(!quiet.planned().contains("warning"), "{}", quiet.planned());
    assert_near(quiet.perplexity(), OWN_HEAD);
    let score = Variant::new()
        .with("score.weight", &[2, 256], 1.0)
        .with("v_head.bias", &[1], 1.0);
    let said = score.planned();
    assert!(
        said.contains("warning: tensors score.weight, v_head.bias are not part"),
        "{said}"
    );
    assert_near(score.perplexity(), OWN_HEAD);
}

#[test]
fn every_tensor_is_looked_at_before_any_work() {
    let last = "model.layers.2.mlp.down_proj.weight";
    let variant = Variant::new().tensors(|all| all.retain(|(name, _)| name != last));
    variant.refused(&[last, "is missing"]);
    let variant = Variant::new().tensors(|all| all.retain(|(name, _)| !name.contains("norm")));
    variant.refused(&["model.layers.0.input_layernorm.weight is missing and 6 more are"]);
    let other = |dtype: &'static str, shape: Value| {
        Variant::new().tensors(|all| {
            let it = all.iter_mut().find(|(name, _)| name == "model.norm.weight");
            let (found, dims, _) = &mut it.unwrap().1;
            (*found, *dims) = (json!(dtype), shape);
        })
    };
    other("F16", json!([2, 128]))
        .refused(&["model.norm.weight has shape [2, 128], expected [256]"]);
    other("I16", json!([256])).refused(&["model.norm.weight has dtype I16", "BF16"]);
}

#[test]
fn settings_of_another_method_are_named_and_those_that_say_nothing_are_none() {
    let with = |settings: Value| Variant::new().config("quantization_config", settings);
    for nothing in [json!(null), json!({})] {
        let variant = with(nothing);
        assert!(!variant.planned().contains("warning"));
        assert_near(variant.perplexity(), OWN_HEAD);
    }
    for (settings, word) in [
        (
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
            "bitsandbytes",
        ),
        (
            json!({"quant_method": "fp8", "activation_scheme": "dynamic"}),
            "fp8",
        ),
        (
            json!({"quant_method": "awq", "bits": 4, "group_size": 128}),
            "awq",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "dense"}),
            "compressed-tensors",
        ),
        (
            json!({"bits": 4, "group_size": 128, "quant_method": "gptq"}),
            "gptq",
        ),
    ] {
        with(settings).refused(&["quantization_config", word, "remove"]);
    }
    // Weights that really are quantized.
    let name = "model.layers.0.mlp.up_proj.weight.absmax";
    let variant = with(json!({"quant_method": "bitsandbytes"})).with(name, &[64], 1.0);
    variant.refused(&["bitsandbytes", "full-precision model"]);
    let variant = Variant::new().with(name, &[64], 1.0);
    variant.refused(&["already quantized, by bitsandbytes", name]);
}

#[test]
fn a_plan_by_the_config_alone_says_that_weights_were_not_looked_at() {
    let variant = Variant::new();
    let plan = || succeed(["plan", variant.recipe().to_str().unwrap()]);
    assert!(
        plan().contains("weights: 30 tensors in 1 file"),
        "{}",
        plan()
    );
    fs::remove_file(variant.model.join(WEIGHTS)).unwrap();
    assert!(plan().contains("weights: not checked"), "{}", plan());
    let recipe = variant.recipe();
    let line = refuse(["quantize", recipe.to_str().unwrap(), "--dry-run"]);
    assert!(line.contains("no checkpoint here"), "{line}");
}

/// Makes medi-tiny in three numbered shards, with an index.
fn sharded() -> (Variant, Value) {
    let variant = Variant::new();
    let path = variant.model.join(WEIGHTS);
    let all = read(&path);
    fs::remove_file(path).unwrap();
    let mut weight_map = serde_json::Map::new();
    for (i, tensors) in all.chunks(10).enumerate() {
        let file = shard(i + 1, 3);
        write(&variant.model.join(&file), &tensors.to_vec());
        weight_map.extend(tensors.iter().map(|(name, _)| (name.clone(), json!(file))));
    }
    (variant, Value::Object(weight_map))
}

fn shard(i: usize, n: usize) -> String {
    format!("model-{i:05}-of-{n:05}.safetensors")
}

#[test]
fn an_index_that_is_wrong_is_no_matter_where_the_shards_have_everything() {
    let rotary = "model.layers.0.self_attn.rotary_emb.inv_freq";
    let norm = "model.norm.weight";
    let stale = |map: &Value| {
        let entries = map.as_object().unwrap().keys();
        entries
            .map(|name| (name.clone(), json!(shard(1, 4))))
            .collect()
    };
    for (change, words) in [
        (None, "no index lists the 3 shards"),
        (
            Some((rotary, shard(1, 3))),
            "lists model.layers.0.self_attn.rotary_emb.inv_freq",
        ),
        (
            Some((norm, shard(1, 3))),
            "lists model.norm.weight in a different file",
        ),
        (
            Some(("", String::new())),
            "model-00001-of-00004.safetensors, which is missing",
        ),
    ] {
        let (variant, mut map) = sharded();
        if let Some((name, file)) = change {
            match name {
                "" => map = Value::Object(stale(&map)),
                _ => map[name] = json!(file),
            }
            let index = variant.model.join("model.safetensors.index.json");
            fs::write(index, json!({"weight_map": map}).to_string()).unwrap();
        }
        let said = variant.planned();
        assert!(said.contains(words), "no {words:?} in: {said}");
        assert_near(variant.perplexity(), OWN_HEAD);
    }
}

#[test]
fn an_index_whose_shards_are_not_there_is_told_with_what_it_says() {
    let (variant, map) = sharded();
    let index = variant.model.join("model.safetensors.index.json");
    fs::write(index, json!({"weight_map": map}).to_string()).unwrap();
    fs::remove_file(variant.model.join(shard(2, 3))).unwrap();
    variant.refused(&[
        "is missing",
        "index.json says it is in model-00002-of-00003.safetensors, which is missing",
    ]);
    for i in [1, 3] {
        fs::remove_file(variant.model.join(shard(i, 3))).unwrap();
    }
    variant.refused(&[
        "index.json: it lists model-00001-of-00003.safetensors",
        "missing",
    ]);
}

#[test]
fn a_weight_that_is_not_finite_ends_a_run_at_once_wherever_it_is() {
    for name in [
        HEAD,
        "model.norm.weight",
        "model.layers.2.mlp.up_proj.weight",
    ] {
        let variant = Variant::new();
        edit_tensor(&variant.model.join(WEIGHTS), name, |bytes| {
            bytes[20..22].copy_from_slice(&0x7e00u16.to_le_bytes());
        });
        let recipe = variant.scratch.recipe(&variant.model, ONE);
        let line = refused(quantize(&recipe, &SLOW).output().unwrap());
        let words = format!("tensor {name} holds 1 non-finite value(s), the first at element 10");
        assert!(line.contains(&words), "{line}");
        // No block was finished.
        variant.scratch.assert_nothing_written();
    }
}
