//! Recipes of models and options: they plan, and mean what the options say.

use serde_json::json;

use super::*;
use crate::BranchPlan;

/// Writes a Llama's config to a directory.
fn model(more: Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config = json!({
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32017,
        "max_position_embeddings": 2048
    });
    let entries = more.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(entries);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn drafted(dir: &tempfile::TempDir, branches: DraftedBranches) -> Recipe {
    let draft = RecipeDraft {
        model: "epfl-llm/meditron-7b".to_owned(),
        output: Some("out/meditron-7B-GPTQ".into()),
        branches,
        ..RecipeDraft::default()
    };
    draft.recipe(&dir.path().join("config.json")).unwrap()
}

fn plan(recipe: &Recipe, dir: &tempfile::TempDir) -> Plan {
    let config = ModelConfig::read(&dir.path().join("config.json")).unwrap();
    Plan::for_config(recipe, config).unwrap()
}

fn each(bits: &[Bits], group_sizes: &[GroupSize], desc_act: Option<bool>) -> DraftedBranches {
    DraftedBranches::Each {
        bits: bits.to_vec(),
        group_sizes: group_sizes.to_vec(),
        desc_act,
        preset: None,
        format: None,
    }
}

#[test]
fn the_published_matrix_is_the_recipe_in_configs() {
    let dir = model(json!({"torch_dtype": "bfloat16"}));
    let drafted = plan(&drafted(&dir, DraftedBranches::Published), &dir);
    let file = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../configs/meditron-7b.toml"
    );
    let bundled = plan(&Recipe::read(Path::new(file)).unwrap(), &dir);
    let branches = |plan: &Plan| format!("{:?}", plan.branches);
    assert_eq!(branches(&drafted), branches(&bundled));
    assert_eq!(
        format!("{:?}", drafted.calibration),
        format!("{:?}", bundled.calibration)
    );
    assert_eq!(drafted.half, bundled.half);
    assert_eq!(drafted.output, bundled.output);
    assert_eq!(drafted.model_name, bundled.model_name);
    assert_eq!(drafted.warnings, bundled.warnings);
}

#[test]
fn groups_windows_and_dtype_fit_the_model() {
    let small = json!({
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "head_dim": 64,
        "max_position_embeddings": 512, "dtype": "bfloat16"
    });
    let dir = model(small);
    let recipe = drafted(&dir, DraftedBranches::default());
    let text = recipe.text();
    let why = "# 128 does not divide the 576 inputs of model.layers.0.";
    assert!(text.contains(why), "{text}");
    let one = plan(&recipe, &dir);
    assert_eq!(one.branches[0].group_size, GroupSize::Columns(64));
    assert_eq!(one.calibration.seq_len, 512);
    assert_eq!(one.half, Half::Bf16);
    assert!(one.warnings.is_empty(), "{:?}", one.warnings);

    // Of the published matrix, 64 takes the place of 128, and no branch is there twice.
    let matrix = plan(&drafted(&dir, DraftedBranches::Published), &dir);
    let names: Vec<&str> = matrix.branches.iter().map(|b| b.name.as_str()).collect();
    let expected = [
        "main",
        "gptq-4bit-32g-actorder_True",
        "gptq-8bit--1g-actorder_True",
        "gptq-8bit-64g-actorder_True",
        "gptq-8bit-32g-actorder_True",
    ];
    assert_eq!(names, expected);
}

#[test]
fn each_width_and_group_size_is_a_branch() {
    let dir = model(json!({}));
    let sizes = [GroupSize::Columns(128), GroupSize::Row];
    let branches = each(&[Bits::Four, Bits::Eight, Bits::Four], &sizes, Some(true));
    let made = plan(&drafted(&dir, branches), &dir);
    let of = |b: &BranchPlan| (b.name.clone(), b.bits.get(), i64::from(b.group_size));
    let found: Vec<_> = made.branches.iter().map(of).collect();
    let named = |name: &str, bits, size| (name.to_owned(), bits, size);
    assert_eq!(
        found,
        [
            named("main", 4, 128),
            named("gptq-4bit--1g-actorder_True", 4, -1),
            named("gptq-8bit-128g-actorder_True", 8, 128),
            named("gptq-8bit--1g-actorder_True", 8, -1),
        ]
    );
}

#[test]
fn options_that_do_not_fit_are_refused_without_a_place_in_a_text() {
    let dir = model(json!({"hidden_size": 576, "num_attention_heads": 9, "head_dim": 64}));
    let draft = RecipeDraft {
        model: "a/b".to_owned(),
        branches: each(&[], &[GroupSize::Columns(128)], None),
        ..RecipeDraft::default()
    };
    let line = draft.recipe(&dir.path().join("config.json")).unwrap_err();
    let line = line.to_string();
    assert!(
        line.starts_with("group_size = 128 does not divide the 576 inputs"),
        "{line}"
    );
}

#[test]
fn the_usual_columns_of_a_local_file_are_recognized() {
    let dir = model(json!({}));
    let made = |name: &str, rows: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, rows).unwrap();
        let draft = RecipeDraft {
            model: "a/b".to_owned(),
            calibration: Some(path.display().to_string()),
            ..RecipeDraft::default()
        };
        let recipe = draft.recipe(&dir.path().join("config.json"));
        recipe.map(|recipe| recipe.text().to_owned())
    };
    for (name, rows, line) in [
        ("a.txt", "One line.\n", "column = \"text\"\n"),
        ("b.csv", "id,text\n1,One\n", "column = \"text\"\n"),
        (
            "c.jsonl",
            r#"{"messages": []}"#,
            "messages = \"messages\"\n",
        ),
        (
            "d.json",
            r#"[{"input_ids": [1]}]"#,
            "tokens = \"input_ids\"\n",
        ),
        (
            "e.jsonl",
            r#"{"input": "a", "output": "b"}"#,
            "template = \"{input}\\n{output}\"\n",
        ),
    ] {
        let text = made(name, rows).unwrap();
        assert!(text.contains(line), "{name}: {text}");
    }
    let line = made("f.jsonl", r#"{"question": "a"}"#).unwrap_err();
    let line = line.to_string();
    for word in ["f.jsonl", "its columns are question", "--template"] {
        assert!(line.contains(word), "{line}");
    }
}
