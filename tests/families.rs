//! Every family through every command, on the tiny models in `golden/families`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use gptq_format::Checkpoint;
use gptq_spec::{Census, model_types};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::budget::stored_bits;
use crate::checkpoints::{copy, families, without_weights};
use crate::harness::{Scratch, gptq, refuse, succeed, succeeded};
use crate::inspect::{read, write};
use crate::resume::{blocks, quantize, start};

const FEW: [&str; 6] = ["--device", "cpu", "--samples", "4", "--seq-len", "64"];
const ROWS: [&str; 4] = [
    "--rows",
    "0:100",
    "--calibration",
    "calibration/wikidoc/wikidoc_patient_information_1000.json",
];

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Returns one directory for each family; of several the one with a sliding window, if any has.
fn one_each() -> BTreeMap<String, String> {
    let entries = fs::read_dir(families()).unwrap();
    let dirs = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let dirs: BTreeSet<String> = dirs
        .filter(|dir| families().join(dir).join("config.json").exists())
        .collect();
    let mut found = BTreeMap::new();
    for dir in dirs {
        let config = json(&families().join(&dir).join("config.json"));
        let family = config["model_type"].as_str().unwrap().to_owned();
        if dir.ends_with("-window") || !found.contains_key(&family) {
            found.insert(family, dir);
        }
    }
    assert!(found.keys().map(String::as_str).eq(model_types()));
    found
}

/// Makes a copy of the model with its tokenizer.
pub(crate) fn model(scratch: &Scratch, dir: &str) -> PathBuf {
    let model = without_weights(scratch, dir);
    copy(&families().join(dir), &model, &["model.safetensors"]);
    model
}

/// Kills a run between its first block and its end.
fn interrupted(recipe: &Path, out: &Path) {
    for _ in 0..20 {
        let mut child = start(quantize(recipe, &FEW));
        while blocks(out) == 0 && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if blocks(out) > 0 && !out.join("a").exists() {
            return;
        }
        // It finished first.
        fs::remove_dir_all(out).unwrap();
    }
    panic!("no run was slow enough to interrupt");
}

#[test]
fn every_family_gives_the_same_bytes_after_an_interruption_and_when_quantized_again() {
    let branch = "[[branch]]\nname = \"a\"\nbits = 3\ngroup_size = 32\npreset = \"best\"\n";
    for (family, dir) in one_each() {
        let scratch = Scratch::new();
        let model = model(&scratch, &dir);
        let (recipe, out) = (scratch.recipe(&model, branch), scratch.out());
        interrupted(&recipe, &out);
        let said = succeeded(quantize(&recipe, &FEW).output().unwrap());
        assert!(said.contains("resuming after block"), "{family}: {said}");
        let again = scratch.path("again");
        let [dir, from, to] = [&out, &model, &again].map(|path| path.to_str().unwrap());
        let args = ["requantize", dir, "--model", from, "--output", to];
        succeed([&args[..], &ROWS, &FEW[..2]].concat());
        for file in ["model.safetensors", "quantize_config.json", "config.json"] {
            let bytes = |dir: &Path| fs::read(dir.join("a").join(file)).unwrap();
            assert!(bytes(&out) == bytes(&again), "{family}: {file} differs");
        }
    }
}

#[test]
fn every_family_has_every_preset_and_keeps_a_budget_and_its_files_are_as_planned() {
    let presets = ["autogptq", "standard", "best"];
    let mut branches: String = presets
        .map(|preset| {
            format!(
                "[[branch]]\nname = {preset:?}\nbits = 3\ngroup_size = 32\npreset = {preset:?}\n"
            )
        })
        .concat();
    branches += "[[branch]]\nname = \"budget\"\nbudget_bits = 5.0\npreset = \"autogptq\"\n\
                 budget_choices = [{ bits = 3, group_size = 32 }, { bits = 8, group_size = 32 }]\n";
    for (family, dir) in one_each() {
        let scratch = Scratch::new();
        let recipe = scratch.recipe(&model(&scratch, &dir), &branches);
        let plan = succeed(["plan", recipe.to_str().unwrap(), "--json"]);
        let plan: Value = serde_json::from_str(&plan).unwrap();
        succeeded(quantize(&recipe, &FEW).output().unwrap());
        let out = scratch.out();
        let name = out.to_str().unwrap();
        succeed(["verify", name, "--no-receipt"]);
        succeed(["report", name]);
        let inspected: Value = serde_json::from_str(&succeed(["inspect", name, "--json"])).unwrap();
        let table = json(&out.join("report-table.json"));
        let page = fs::read_to_string(out.join("report.html")).unwrap();

        let planned = plan["branches"].as_array().unwrap();
        assert_eq!(planned.len(), 4);
        for branch in planned {
            let name = branch["name"].as_str().unwrap();
            let found = &inspected[name];
            let loads = |of: &Value| -> Vec<(Value, Value)> {
                let clients = of["clients"].as_array().unwrap().iter();
                clients
                    .map(|it| (it["name"].clone(), it["loads"].clone()))
                    .collect()
            };
            assert_eq!(loads(branch), loads(found), "{family} {name}: {found}");
            let [bytes, bound] = [&found["tensor_bytes"], &branch["bytes"]].map(Value::as_u64);
            match name {
                "budget" => assert!(bytes <= bound, "{family}: {bytes:?} of {bound:?}"),
                _ => assert_eq!(bytes, bound, "{family} {name}"),
            }
            let report = json(&out.join(name).join("report.json"));
            let modules = |of: &Value| -> BTreeSet<String> {
                let linears = of["linears"].as_array().unwrap().iter();
                linears
                    .map(|it| it["name"].as_str().unwrap().to_owned())
                    .collect()
            };
            assert_eq!(modules(&report), modules(found), "{family} {name}");
            let mut rows = table.as_array().unwrap().iter();
            assert!(rows.any(|row| row["branch"] == name), "{family}: {table}");
            // Those of experts share a cell.
            let found = modules(found);
            let mut alone = found.iter().filter(|module| !module.contains(".experts."));
            assert!(page.contains(alone.next().unwrap()), "{family} {name}");
        }

        let report = |name: &str| json(&out.join(name).join("report.json"));
        // Of the blocks together, at the last one's output.
        let error = |name: &str| {
            assert_eq!(report(name)["preset"], name, "{family}");
            let blocks = report(name)["blocks"].as_array().unwrap().clone();
            blocks.last().unwrap()["output_error"].as_f64().unwrap()
        };
        // On the tokens that it was fitted to: a third and less on all of these models.
        let [plain, standard, best] = presets.map(error);
        assert!(
            best < 0.6 * standard && best < 0.6 * plain,
            "{family}: {best} of {standard}"
        );
        let weights = |name: &str| fs::read(out.join(name).join("model.safetensors")).unwrap();
        assert!(weights("autogptq") != weights("standard"), "{family}");

        let budget = report("budget");
        let bits = budget["budget"]["mean_bits"].as_f64().unwrap();
        let file = out.join("budget/model.safetensors");
        let stored = stored_bits(&file, budget["linears"].as_array().unwrap());
        assert!(
            (stored - bits).abs() < 1e-9,
            "{family}: {stored} is not {bits}"
        );
        // With 3 bits throughout it is 3.8, and 8.8 with 8.
        assert!((4.2..=5.0).contains(&bits), "{family}: {bits}");
    }
}

#[test]
fn every_family_runs_in_bf16_on_dense_inputs_and_its_branch_speaks() {
    let branch = "[[branch]]\nname = \"a\"\nbits = 8\ngroup_size = 32\n";
    for (family, dir) in one_each() {
        let scratch = Scratch::new();
        let model = model(&scratch, &dir);
        let recipe = scratch.recipe_with(&model, "propagate = \"dense\"", "", branch);
        let text = fs::read_to_string(&recipe).unwrap();
        let text = text.replace("[model]\n", "[model]\ndtype = \"bf16\"\n");
        fs::write(&recipe, text).unwrap();
        succeeded(quantize(&recipe, &FEW).output().unwrap());
        let branch = scratch.out().join("a");
        assert_eq!(
            json(&branch.join("report.json"))["propagation"],
            "dense",
            "{family}"
        );

        let carried = Census::take(&model).unwrap().config.carried;
        let carried: BTreeSet<String> = carried.into_iter().map(|it| it.name).collect();
        let (dense, made) = (
            Checkpoint::open(&model).unwrap(),
            Checkpoint::open(&branch).unwrap(),
        );
        for name in made.names() {
            let expected = match name.rsplit('.').next().unwrap() {
                "qweight" | "qzeros" | "g_idx" => Dtype::I32,
                "scales" => Dtype::F16,
                "e_score_correction_bias" => Dtype::F32,
                _ if carried.contains(name) => dense.view(name).unwrap().dtype,
                _ => Dtype::BF16,
            };
            assert_eq!(made.view(name).unwrap().dtype, expected, "{family}: {name}");
        }

        let all = crate::harness::root().join("tests/data/eval_wikidoc_40.json");
        let text = scratch.path("few.json");
        fs::write(
            &text,
            json!(json(&all).as_array().unwrap()[..8]).to_string(),
        )
        .unwrap();
        let [name, text, model] = [&branch, &text, &model].map(|it| it.to_str().unwrap());
        let args = [
            "verify",
            name,
            "--text",
            text,
            "--window",
            "64",
            "--against",
            model,
        ];
        succeed([&args[..], &FEW[..2]].concat());
        let receipt = json(&branch.join("verify.json"));
        assert_eq!(receipt["pass"], true, "{family}: {receipt}");
        let perplexity = |key: &str| receipt["perplexity"][key].as_f64().unwrap();
        let ratio = perplexity("value") / perplexity("dense");
        assert!((ratio - 1.0).abs() < 0.02, "{family}: {ratio}");

        // More tokens than a sliding window of these models holds, which is 24.
        let args = [
            "generate",
            name,
            "--prompt",
            "Asthma is a condition",
            "--json",
        ];
        let more = ["--greedy", "--ignore-eos", "--max-new-tokens", "40"];
        let reply = succeed([&args[..], &more, &FEW[..2]].concat());
        let reply: Value = serde_json::from_str(reply.trim()).unwrap();
        assert_eq!(reply["tokens"].as_array().unwrap().len(), 40, "{family}");
    }
}

#[test]
fn tensors_that_are_not_run_are_listed_in_the_plan_and_those_nobody_knows_in_a_warning() {
    for (family, parts) in [
        (
            "gemma3",
            "2 tensors of multi_modal_projector, 32 tensors of vision_tower",
        ),
        (
            "mistral3",
            "4 tensors of multi_modal_projector, 11 tensors of vision_tower",
        ),
    ] {
        let scratch = Scratch::new();
        let model = model(&scratch, family);
        let file = model.join("model.safetensors");
        let mut tensors = read(&file);
        let seen = tensors.iter().map(|(name, _)| name.clone());
        let seen: BTreeSet<String> = seen
            .filter(|name| !name.starts_with("language_model."))
            .collect();
        tensors.push((
            "score.weight".into(),
            (json!("F16"), json!([1]), vec![0, 0x3c]),
        ));
        write(&file, &tensors);

        let branch = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 32\n";
        let recipe = scratch.recipe(&model, branch);
        let recipe = recipe.to_str().unwrap();
        let plan = succeed(["plan", recipe]);
        assert!(
            plan.contains(&format!("not run, copied unchanged: {parts}\n")),
            "{plan}"
        );
        let plan: Value = serde_json::from_str(&succeed(["plan", recipe, "--json"])).unwrap();
        let copied: BTreeSet<String> = serde_json::from_value(plan["copied"].clone()).unwrap();
        assert_eq!(copied, seen, "{family}");
        for command in [vec!["plan", recipe], vec!["quantize", recipe, "--dry-run"]] {
            let said = String::from_utf8(gptq(command).stderr).unwrap();
            for words in [
                "warning: tensor score.weight is not part of the model and ignored",
                "are part of what is not run, and copied unchanged",
            ] {
                assert!(said.contains(words), "{family}: {said}");
            }
        }
        scratch.assert_nothing_written();

        succeed([&["quantize", recipe][..], &FEW].concat());
        let made = read(&scratch.out().join("a/model.safetensors"));
        let made: BTreeSet<String> = made.into_iter().map(|(name, _)| name).collect();
        assert!(
            made.is_superset(&seen) && !made.contains("score.weight"),
            "{made:?}"
        );
    }
}

#[test]
fn what_a_family_does_not_compute_is_refused_by_every_command_in_one_line() {
    for (family, key, value, words) in [
        (
            "mistral3",
            "model_type",
            json!("ministral3"),
            "text_config.model_type \"ministral3\" is not",
        ),
        (
            "cohere2",
            "model_type",
            json!("ministral3"),
            "known are: cohere2, exaone4, gemma2,",
        ),
        (
            "qwen3",
            "hidden_act",
            json!("relu"),
            "hidden_act \"relu\" is not supported, only silu",
        ),
        (
            "olmo2",
            "rope_parameters",
            json!({"rope_type": "ntk"}),
            "rope_parameters.rope_type \"ntk\"",
        ),
        (
            "gemma3",
            "is_causal",
            json!(false),
            "text_config.is_causal = false",
        ),
        (
            "glm4",
            "per_layer_config",
            json!({"0": {}}),
            "per_layer_config is not supported",
        ),
    ] {
        let scratch = Scratch::new();
        let model = model(&scratch, family);
        let path = model.join("config.json");
        let mut config = json(&path);
        let text = match config.get("text_config") {
            Some(_) => &mut config["text_config"],
            None => &mut config,
        };
        text[key] = value;
        fs::write(&path, config.to_string()).unwrap();
        let recipe = scratch.recipe(
            &model,
            "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 32\n",
        );
        let (recipe, model) = (recipe.to_str().unwrap(), model.to_str().unwrap());
        for command in [
            vec!["plan", recipe],
            vec!["quantize", recipe],
            vec!["verify", model],
            vec!["generate", model, "--prompt", "Asthma"],
        ] {
            let line = refuse(&command);
            assert!(
                line.contains("config.json") && line.contains(words),
                "{command:?}: {line}"
            );
        }
        scratch.assert_nothing_written();
    }
}
