//! `gptq verify`: what passes, and what is caught.

use std::fs;
use std::path::PathBuf;

use crate::harness::{Scratch, edit_header, edit_tensor, medi_tiny, refuse, succeed};

/// A finished 4-bit branch in groups of 64.
fn branch(scratch: &Scratch) -> PathBuf {
    let recipe = scratch.recipe(
        &medi_tiny(),
        "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\n",
    );
    succeed(["quantize", recipe.to_str().unwrap()]);
    scratch.out().join("a")
}

#[test]
fn a_branch_and_its_base_are_run_side_by_side() {
    let scratch = Scratch::new();
    let dir = branch(&scratch);
    let verdict = succeed([
        "verify",
        dir.to_str().unwrap(),
        "--text",
        "tests/data/eval_wikidoc_40.json",
        "--window",
        "512",
        "--against",
        "tests/models/medi-tiny",
    ]);
    assert!(
        verdict.contains("93 tensors") && verdict.contains("21 quantised"),
        "{verdict}"
    );
    assert!(
        verdict.contains("dense model") && verdict.contains("windows of 512"),
        "{verdict}"
    );
}

#[test]
fn plain_text_is_one_document() {
    let scratch = Scratch::new();
    let text = scratch.path("text.txt");
    fs::write(&text, "A cold is a mild infection of the nose. ".repeat(40)).unwrap();
    let verdict = succeed([
        "verify",
        "tests/models/medi-tiny",
        "--text",
        text.to_str().unwrap(),
        "--window",
        "64",
    ]);
    assert!(verdict.contains("perplexity"), "{verdict}");
    let line = refuse([
        "verify",
        "tests/models/medi-tiny",
        "--text",
        text.to_str().unwrap(),
        "--window",
        "9999",
    ]);
    assert!(
        line.contains("too little evaluation text") && line.contains("9999"),
        "{line}"
    );
    let line = refuse([
        "verify",
        "tests/models/medi-tiny",
        "--text",
        text.to_str().unwrap(),
        "--window",
        "1",
    ]);
    assert!(line.contains("at least 2"), "{line}");
}

#[test]
fn damage_is_caught_and_named() {
    let weights = "model.safetensors";
    let module = "model.layers.1.mlp.down_proj";
    for (what, damage, words) in [
        (
            "g_idx out of range",
            Box::new(|dir: &PathBuf| {
                edit_tensor(&dir.join(weights), &format!("{module}.g_idx"), |b| {
                    b[..4].copy_from_slice(&99i32.to_le_bytes())
                });
            }) as Box<dyn Fn(&PathBuf)>,
            &["g_idx[0] = 99", "12 groups"][..],
        ),
        (
            "a scale of zero",
            Box::new(|dir| {
                edit_tensor(&dir.join(weights), &format!("{module}.scales"), |b| {
                    b[6..8].fill(0)
                })
            }),
            &[module, "scale [0, 3] is 0"],
        ),
        (
            "a non-finite scale",
            Box::new(|dir| {
                edit_tensor(&dir.join(weights), &format!("{module}.scales"), |b| {
                    b[..2].copy_from_slice(&0x7c00u16.to_le_bytes())
                });
            }),
            &["down_proj.scales", "non-finite"],
        ),
        (
            "a renamed tensor",
            Box::new(|dir| {
                edit_header(
                    &dir.join(weights),
                    "layers.1.mlp.down_proj.qzeros",
                    "layers.1.mlp.down_proj.xzeros",
                )
            }),
            &["down_proj.qzeros is missing"],
        ),
        (
            "a config that asks for another group size",
            Box::new(|dir| {
                for file in ["config.json", "quantize_config.json"] {
                    let text = fs::read_to_string(dir.join(file)).unwrap();
                    fs::write(
                        dir.join(file),
                        text.replace("\"group_size\": 64", "\"group_size\": 32"),
                    )
                    .unwrap();
                }
            }),
            &["qzeros", "expected"],
        ),
        (
            "configs that disagree",
            Box::new(|dir| {
                let file = dir.join("quantize_config.json");
                let text = fs::read_to_string(&file).unwrap();
                fs::write(
                    &file,
                    text.replace("\"desc_act\": true", "\"desc_act\": false"),
                )
                .unwrap();
            }),
            &["disagree"],
        ),
    ] {
        let scratch = Scratch::new();
        let dir = branch(&scratch);
        damage(&dir);
        let line = refuse(["verify", dir.to_str().unwrap()]);
        assert!(words.iter().all(|w| line.contains(w)), "{what}: {line}");
    }
}
