//! Mixtures of experts: experts that a router starves, settings of single experts, every token for every expert.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoints::{copy, families, without_weights};
use crate::harness::{Scratch, edit_tensor, gptq, refuse, succeed, succeeded};
use crate::resume::quantize;

const WINDOWS: [&str; 6] = ["--device", "cpu", "--samples", "8", "--seq-len", "128"];

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn model(scratch: &Scratch, family: &str) -> PathBuf {
    let model = without_weights(scratch, family);
    copy(&families().join(family), &model, &["model.safetensors"]);
    model
}

/// A model whose router never chooses these experts of its second block: their scores are corrected for the choice.
fn starved(scratch: &Scratch, experts: &[usize]) -> PathBuf {
    let model = model(scratch, "glm4_moe");
    let bias = "model.layers.1.mlp.gate.e_score_correction_bias";
    edit_tensor(&model.join("model.safetensors"), bias, |bytes| {
        for &expert in experts {
            bytes[4 * expert..4 * expert + 4].copy_from_slice(&(-10f32).to_le_bytes());
        }
    });
    model
}

/// Mean ratio of the output error to round-to-nearest's, of some experts' linears.
fn ratio(report: &Value, of: impl Fn(usize) -> bool) -> f64 {
    let linears = report["linears"].as_array().unwrap().iter();
    let ratios = linears.filter_map(|linear| {
        let (_, rest) = linear["name"].as_str()?.split_once("experts.")?;
        let expert: usize = rest.split('.').next()?.parse().ok()?;
        let number = |key: &str| linear[key].as_f64().unwrap();
        of(expert).then(|| number("output_error") / number("rtn_output_error"))
    });
    let ratios: Vec<f64> = ratios.collect();
    assert!(!ratios.is_empty());
    ratios.iter().sum::<f64>() / ratios.len() as f64
}

#[test]
fn experts_that_the_router_starves_are_calibrated_on_other_tokens_and_named() {
    let scratch = Scratch::new();
    let gone = [1, 4, 6];
    let branches = "[[branch]]\nname = \"plain\"\nbits = 3\ngroup_size = 32\npreset = \"standard\"\n\
                    [[branch]]\nname = \"best\"\nbits = 3\ngroup_size = 32\npreset = \"best\"\n";
    let recipe = scratch.recipe(&starved(&scratch, &gone), branches);
    let output = quantize(&recipe, &WINDOWS).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    succeeded(output);
    for name in ["plain", "best"] {
        let words = format!("{name}: 3 of 8 experts were given fewer than 64 calibration tokens");
        assert!(said.contains(&words), "{said}");
        let report = json(&scratch.out().join(name).join("report.json"));
        let tokens: Vec<u64> =
            serde_json::from_value(report["blocks"][1]["expert_tokens"].clone()).unwrap();
        assert_eq!(tokens.iter().sum::<u64>(), 2 * 8 * 128, "{tokens:?}");
        for (expert, &tokens) in tokens.iter().enumerate() {
            assert_eq!(gone.contains(&expert), tokens == 0, "{expert}");
        }
        // Compared on tokens that the others were given: nearest rounding is 1, and experts with tokens come to 0.83.
        let [starved, fed] = [true, false].map(|is| ratio(&report, |it| gone.contains(&it) == is));
        assert!(starved < 0.9, "{name}: {starved}");
        assert!(
            name == "best" || starved < 1.1 * fed,
            "{name}: {starved} and {fed}"
        );
    }
    let out = scratch.out();
    succeed(["report", out.to_str().unwrap()]);
    let page = fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("Tokens of 8 experts") && page.contains("<rect x=\"7\" class=\"e0\"/>"));
}

#[test]
fn an_expert_with_settings_of_its_own_is_written_so_and_keeps_programs_that_fuse_experts_away() {
    let scratch = Scratch::new();
    let model = model(&scratch, "qwen3_moe");
    let branch = |own: &str| format!("[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 32\n{own}");
    let loads = |own: &str| {
        let recipe = scratch.recipe(&model, &branch(own));
        let plan = succeed(["plan", recipe.to_str().unwrap(), "--json"]);
        let plan: Value = serde_json::from_str(&plan).unwrap();
        let clients = plan["branches"][0]["clients"].as_array().unwrap().clone();
        let mut sglang = clients.iter().filter(|it| it["name"] == "SGLang");
        sglang.next().unwrap()["loads"].clone()
    };
    let all = "[[branch.override]]\nmatch = \"*.experts.*\"\nbits = 8\n";
    let one = "[[branch.override]]\nmatch = \"*.experts.3.*\"\nbits = 8\n";
    assert_eq!(
        [loads(""), loads(all), loads(one)],
        [true, true, false].map(Value::from)
    );
    let recipe = scratch.recipe(&model, &branch(all));
    succeeded(quantize(&recipe, &WINDOWS).output().unwrap());
    let config = json(&scratch.out().join("a/quantize_config.json"));
    let rules: Vec<&String> = config["dynamic"].as_object().unwrap().keys().collect();
    let expected = [
        "+:model\\.layers\\.\\d+\\.(mlp\\.experts)",
        "-:model\\.layers\\.\\d+\\.(mlp\\.gate)",
    ];
    assert_eq!(rules, expected);
    succeed(["verify", scratch.out().to_str().unwrap(), "--no-receipt"]);
}

#[test]
fn every_token_for_every_expert_costs_what_the_plan_says() {
    let scratch = Scratch::new();
    let model = model(&scratch, "olmoe");
    let branch = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 32\nexperts = \"all\"\n";
    let recipe = scratch.recipe(&model, branch);
    let plan = gptq(["plan", recipe.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&plan.stderr).into_owned();
    assert!(
        said.contains("experts = \"all\" gives every token to all 8 experts"),
        "{said}"
    );
    assert!(said.contains("4 times the products"), "{said}");
    succeeded(quantize(&recipe, &WINDOWS).output().unwrap());
    let report = json(&scratch.out().join("a/report.json"));
    assert_eq!(report["method"]["experts"], "all");
    assert_eq!(
        report["blocks"][0]["expert_tokens"]
            .as_array()
            .unwrap()
            .len(),
        8
    );
    let tuned = branch.replace("experts = \"all\"", "preset = \"tuned\"");
    let recipe = scratch.recipe(&model, &tuned);
    let line = refuse(["plan", recipe.to_str().unwrap()]);
    assert!(line.contains("mixtures of experts are not tuned"), "{line}");
}
