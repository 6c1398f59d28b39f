//! Column order and groups that clients accept, and the messages about them.

use std::fs;
use std::path::Path;

use gptq_format::Checkpoint;
use serde_json::{Value, json};

use crate::harness::{Scratch, medi_tiny, succeed};
use crate::written::{edit, quantize, read};

/// Returns true if every group of every linear layer has contiguous columns.
fn in_order(dir: &Path, columns: usize) -> bool {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let names: Vec<&str> = checkpoint
        .names()
        .filter(|name| name.ends_with(".g_idx"))
        .collect();
    assert_eq!(names.len(), 21);
    names.iter().all(|name| {
        let n_in = checkpoint.view(name).unwrap().shape[0];
        let order = checkpoint.i32(name, &[n_in]).unwrap();
        order
            .iter()
            .enumerate()
            .all(|(i, &g)| g as usize == i / columns)
    })
}

#[test]
fn columns_are_solved_in_act_order_and_groups_lie_as_every_reader_takes_them() {
    let scratch = Scratch::new();
    let dir = quantize(&scratch, &medi_tiny(), "");
    for file in ["quantize_config.json", "config.json"] {
        let config = read(&dir.join(file));
        let config = config.get("quantization_config").unwrap_or(&config);
        assert_eq!(
            (&config["desc_act"], &config["static_groups"]),
            (&json!(false), &json!(true))
        );
    }
    assert!(in_order(&dir, 128));
    let report = read(&dir.join("report.json"));
    assert_eq!(report["solved"]["act_order"], true);
    let inspected = succeed(["inspect", dir.to_str().unwrap()]);
    assert!(
        inspected.contains("no act order")
            && inspected.contains("not in: mlx-lm (does not read gptq"),
        "{inspected}"
    );
    let verdict = succeed(["verify", dir.to_str().unwrap()]);
    assert!(
        verdict.contains("vLLM") && verdict.contains("AutoRound"),
        "{verdict}"
    );
    succeed(["report", dir.to_str().unwrap()]);
    let table = fs::read_to_string(dir.join("report-table.csv")).unwrap();
    let cells =
        |line: usize| -> Vec<&str> { table.lines().nth(line).unwrap().split(',').collect() };
    let column = |name: &str| cells(1)[cells(0).iter().position(|it| *it == name).unwrap()];
    assert_eq!(
        (column("desc_act"), column("act_order")),
        ("false", "static")
    );

    let other = Scratch::new();
    let dir = quantize(&other, &medi_tiny(), "desc_act = true\n");
    assert_eq!(read(&dir.join("quantize_config.json"))["desc_act"], true);
    assert!(!in_order(&dir, 128));
    let inspected = succeed(["inspect", dir.to_str().unwrap()]);
    assert!(
        inspected.contains("vLLM (no act order (desc_act))"),
        "{inspected}"
    );
    let plan = succeed(["plan", other.path("recipe.toml").to_str().unwrap()]);
    assert!(
        plan.contains("a: not in vLLM: no act order (desc_act)"),
        "{plan}"
    );
    assert!(
        plan.contains("a: not in AutoRound: no act order (desc_act)"),
        "{plan}"
    );
}

#[test]
fn an_older_branch_is_made_again_in_the_order_that_it_has() {
    let scratch = Scratch::new();
    let dir = quantize(&scratch, &medi_tiny(), "desc_act = true\n");
    let first = Checkpoint::open(&dir)
        .unwrap()
        .i32("model.layers.0.mlp.up_proj.g_idx", &[256])
        .unwrap();
    // As written by a version with that default.
    let recipe = read(&dir.join("report.json"))["recipe"]
        .as_str()
        .unwrap()
        .to_owned();
    let recipe = recipe.replace("desc_act = true\n", "");
    edit(
        &dir.join("report.json"),
        &json!({"recipe": recipe, "solved": null, "fingerprint": null}),
    );
    let out = scratch.out();
    let args = [
        "requantize",
        out.to_str().unwrap(),
        "--calibration",
        "calibration/wikidoc/wikidoc_patient_information_1000.json",
        "--rows",
        "0:100",
        "--device",
        "cpu",
    ];
    succeed(args);
    let again = scratch.path("out-recalibrated/a");
    assert_eq!(read(&again.join("quantize_config.json"))["desc_act"], true);
    let second = Checkpoint::open(&again)
        .unwrap()
        .i32("model.layers.0.mlp.up_proj.g_idx", &[256])
        .unwrap();
    assert_eq!(second, first, "the same text again");
    assert_eq!(
        read(&again.join("report.json"))["solved"]["act_order"],
        true
    );
}

#[test]
fn groups_that_a_recipe_leaves_open_and_shares_of_devices_are_planned() {
    let scratch = Scratch::new();
    let config = scratch.path("config.json");
    let shapes = |hidden: usize, intermediate: usize, heads: usize, kv: usize| {
        let shapes = json!({
            "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 2,
            "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": 1000
        });
        fs::write(&config, shapes.to_string()).unwrap();
    };
    let plan = |branch: &str, more: &[&str]| {
        let recipe = scratch.recipe(
            Path::new("nowhere"),
            &format!("[[branch]]\nname = \"a\"\nbits = 4\n{branch}"),
        );
        let args = [
            "plan",
            recipe.to_str().unwrap(),
            "--model-config",
            config.to_str().unwrap(),
        ];
        succeed(args.iter().chain(more))
    };
    shapes(576, 1536, 9, 3);
    let text = plan("", &[]);
    let note =
        "a: groups of 64, as 128 does not divide the 576 inputs of model.layers.0.self_attn.q_proj";
    assert!(text.contains(note), "{text}");
    assert!(
        text.contains("a: not in vLLM: needs out % 64 = 0 and in % 128 = 0"),
        "{text}"
    );
    shapes(8192, 29568, 64, 8);
    let text = plan("", &["--tp", "2"]);
    assert!(
        text.contains("a: not over 2 devices: model.layers.0.mlp.down_proj: 14784 of 29568 inputs"),
        "{text}"
    );
    let json: Value =
        serde_json::from_str(&plan("group_size = 32", &["--tp", "2", "--json"])).unwrap();
    let split = &json["branches"][0]["tensor_parallel"];
    assert_eq!(
        (&split["ranks"], &split["splits"]),
        (&json!(2), &json!(true))
    );
    let client = |name: &str| {
        let all = split["clients"].as_array().unwrap();
        all.iter().find(|it| it["name"] == name).unwrap()["loads"].clone()
    };
    assert_eq!(
        (client("vLLM"), client("SGLang")),
        (json!(false), json!(true))
    );
    let tried = &json["branches"][0]["clients"][0]["tried"];
    assert!(tried.as_str().unwrap().contains("7.7.0"), "{tried}");
}
