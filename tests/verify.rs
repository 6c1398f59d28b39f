//! `gptq verify`: accepted branches, and detected damage.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{Scratch, edit_header, edit_tensor, gptq, medi_tiny, refuse, succeed};

/// Makes a finished 4-bit branch in groups of 64, scattered by act order.
fn branch(scratch: &Scratch) -> PathBuf {
    let recipe = scratch.recipe(
        &medi_tiny(),
        "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\ndesc_act = true\n",
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
        verdict.contains("93 tensors") && verdict.contains("21 quantized"),
        "{verdict}"
    );
    assert!(verdict.contains("windows of 512"), "{verdict}");
    let receipt: Value =
        serde_json::from_slice(&fs::read(dir.join("verify.json")).unwrap()).unwrap();
    assert_eq!(receipt["pass"], true);
    assert_eq!(receipt["blocks"].as_array().unwrap().len(), 3);
    let number = |name: &str| receipt[name].as_f64().unwrap();
    assert!(number("kl_divergence") > 0.0 && number("top1_agreement") < 1.0);
    let perplexity = &receipt["perplexity"];
    assert!(perplexity["value"].as_f64() > perplexity["dense"].as_f64());
    assert_eq!(perplexity["window"], 512);
    let names: Vec<&String> = receipt["files"].as_object().unwrap().keys().collect();
    assert!(names.iter().any(|n| *n == "model.safetensors"));
    assert!(names.iter().all(|n| *n != "verify.json"));
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
fn rows_are_texts_and_those_that_were_calibrated_on_are_refused() {
    let scratch = Scratch::new();
    let row = |i: usize| json!({"id": i, "text": format!("A cold, no. {i}, is a mild infection. ").repeat(9)});
    let rows = |numbers: std::ops::Range<usize>| -> String {
        numbers.map(|i| format!("{}\n", row(i))).collect()
    };
    let (own, other) = (scratch.path("own.jsonl"), scratch.path("other.jsonl"));
    fs::write(&own, rows(0..60)).unwrap();
    fs::write(&other, rows(60..80)).unwrap();
    let list = scratch.path("other.json");
    let texts: Vec<Value> = (60..80).map(|i| row(i)["text"].clone()).collect();
    fs::write(&list, serde_json::to_vec(&texts).unwrap()).unwrap();
    let one = "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 64\n";
    let recipe = scratch.recipe(&medi_tiny(), one);
    let args = [
        "quantize",
        recipe.to_str().unwrap(),
        "--column",
        "text",
        "--calibration",
    ];
    succeed(args.iter().chain(&[own.to_str().unwrap()]));
    let dir = scratch.out().join("a");
    let verify = |text: &Path| {
        let args = [
            "verify",
            dir.to_str().unwrap(),
            "--window",
            "64",
            "--json",
            "--text",
        ];
        let output = gptq(args.iter().chain(&[text.to_str().unwrap()]));
        let stdout = String::from_utf8(output.stdout).unwrap();
        serde_json::from_str::<Value>(&stdout).unwrap()
    };
    // Not as the raw JSON in the file.
    let measured = verify(&other)["perplexity"]["value"].clone();
    assert!(measured.is_number());
    assert_eq!(measured, verify(&list)["perplexity"]["value"]);
    let refused = verify(&own);
    assert_eq!(refused["pass"], false);
    let said = refused["checks"].to_string();
    assert!(said.contains("used for calibration"), "{said}");
}

#[test]
fn the_dense_model_agrees_with_itself() {
    let text = succeed([
        "verify",
        "tests/models/medi-tiny",
        "--text",
        "tests/data/eval_wikidoc_40.json",
        "--window",
        "512",
        "--against",
        "tests/models/medi-tiny",
        "--json",
    ]);
    let receipt: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(receipt["kl_divergence"], 0.0);
    assert_eq!(receipt["top1_agreement"], 1.0);
    assert_eq!(receipt["blocks"][2]["relative_error"], 0.0);
    let perplexity = &receipt["perplexity"];
    assert_eq!(perplexity["value"], perplexity["dense"]);
    assert!(
        !medi_tiny().join("verify.json").exists(),
        "no receipt in a dense model"
    );
}

#[test]
fn a_tolerance_that_fails_is_told_and_leaves_a_failing_receipt() {
    let scratch = Scratch::new();
    branch(&scratch);
    let line = refuse([
        "verify",
        scratch.out().to_str().unwrap(),
        "--text",
        "tests/data/eval_wikidoc_40.json",
        "--window",
        "512",
        "--against",
        "tests/models/medi-tiny",
        "--max-kl",
        "0.00001",
        "--max-block-error",
        "0.00001",
    ]);
    assert!(line.contains("a: KL divergence: 0.0"), "{line}");
    assert!(line.contains("blocks: largest relative error"), "{line}");
    assert!(!line.contains("perplexity:"), "{line}");
    let receipt = fs::read(scratch.out().join("a/verify.json")).unwrap();
    let receipt: Value = serde_json::from_slice(&receipt).unwrap();
    assert_eq!(receipt["pass"], false);
}

#[test]
fn a_matrix_is_one_table_and_one_bad_branch_fails_it() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(
        &medi_tiny(),
        "[[branch]]\nname = \"b\"\nbits = 8\ngroup_size = 64\n\
         [[branch]]\nname = \"main\"\nbits = 4\ngroup_size = 64\n",
    );
    succeed(["quantize", recipe.to_str().unwrap()]);
    let table = succeed(["verify", scratch.out().to_str().unwrap()]);
    let (main, b) = (table.rfind("main").unwrap(), table.rfind("\nb ").unwrap());
    assert!(main < b, "main comes first: {table}");
    let file = scratch.out().join("b/model.safetensors");
    edit_tensor(&file, "model.layers.0.mlp.up_proj.qweight", |b| b[100] ^= 4);
    let line = refuse(["verify", scratch.out().to_str().unwrap()]);
    assert!(line.contains("b: digests"), "{line}");
}

/// Every kind of damage that leaves a file readable, in a tensor of each kind.
#[test]
fn a_change_of_any_quantized_tensor_is_caught() {
    let scratch = Scratch::new();
    let dir = branch(&scratch);
    let file = dir.join("model.safetensors");
    let module = "model.layers.2.self_attn.k_proj";
    let whole = fs::read(&file).unwrap();
    let swap = |b: &mut [u8], i: usize, j: usize, n: usize| {
        assert_ne!(b[i..i + n], b[j..j + n], "a swap of equals is no damage");
        (0..n).for_each(|k| b.swap(i + k, j + k));
    };
    let flip = |bit: usize| move |b: &mut [u8]| b[bit / 8] ^= 1 << (bit % 8);
    type Damage = Box<dyn Fn(&mut [u8])>;
    let cases: Vec<(&str, &str, Damage)> = vec![
        ("a flipped bit", "qweight", Box::new(flip(0))),
        (
            "the last bit",
            "qweight",
            Box::new(|b| *b.last_mut().unwrap() ^= 128),
        ),
        ("a flipped bit", "qzeros", Box::new(flip(77))),
        ("a flipped bit", "scales", Box::new(flip(16))),
        ("a flipped bit", "g_idx", Box::new(flip(0))),
        (
            "swapped scales",
            "scales",
            Box::new(move |b| swap(b, 0, 2, 2)),
        ),
        ("an off-by-one zero", "qzeros", Box::new(|b| b[5] += 1)),
        (
            "a permuted g_idx",
            "g_idx",
            Box::new(move |b| {
                let other = (4..b.len()).step_by(4).find(|&i| b[i] != b[0]).unwrap();
                swap(b, 0, other, 4);
            }),
        ),
    ];
    for (what, suffix, damage) in cases {
        fs::write(&file, &whole).unwrap();
        edit_tensor(&file, &format!("{module}.{suffix}"), damage);
        let line = refuse(["verify", dir.to_str().unwrap()]);
        assert!(
            line.contains(&format!("{module}.{suffix}")) || line.contains(module),
            "{what}: {line}"
        );
    }
    fs::write(&file, &whole).unwrap();
    succeed(["verify", dir.to_str().unwrap()]);
}

#[test]
fn without_a_record_the_files_are_judged_by_what_they_say_and_do() {
    let scratch = Scratch::new();
    let dir = branch(&scratch);
    fs::remove_file(dir.join("report.json")).unwrap();
    let verdict = succeed(["verify", dir.to_str().unwrap()]);
    assert!(verdict.contains("not recorded"), "{verdict}");
    let file = dir.join("model.safetensors");
    let module = "model.layers.2.self_attn.k_proj";
    edit_tensor(&file, &format!("{module}.qzeros"), |b| b[5] += 1);
    let line = refuse(["verify", dir.to_str().unwrap()]);
    assert!(
        line.contains("zero points") && line.contains(module),
        "{line}"
    );
    edit_tensor(&file, &format!("{module}.qzeros"), |b| b[5] -= 1);
    // Scales of one group, shifted by one output: nothing in the file looks wrong.
    edit_tensor(&file, &format!("{module}.scales"), |b| {
        b[..256].rotate_left(2)
    });
    succeed(["verify", dir.to_str().unwrap()]);
    let line = refuse([
        "verify",
        dir.to_str().unwrap(),
        "--text",
        "tests/data/eval_wikidoc_40.json",
        "--window",
        "512",
        "--against",
        "tests/models/medi-tiny",
        "--max-block-error",
        "0.01",
    ]);
    assert!(line.contains("in block 2"), "{line}");
}

#[test]
fn g_idx_and_desc_act_go_together() {
    let scratch = Scratch::new();
    let dir = branch(&scratch);
    for file in ["config.json", "quantize_config.json"] {
        let text = fs::read_to_string(dir.join(file)).unwrap();
        let text = text.replace("\"desc_act\": true", "\"desc_act\": false");
        fs::write(dir.join(file), text).unwrap();
    }
    let line = refuse(["verify", dir.to_str().unwrap()]);
    assert!(
        line.contains("g_idx") && line.contains("without act order"),
        "{line}"
    );
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
