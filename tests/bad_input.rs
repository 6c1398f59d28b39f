//! Bad input: one clear line, status 1, no partial output.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::json;

use crate::harness::{Scratch, edit_header, edit_tensor, medi_tiny, refuse, succeed};
use crate::inspect::{read, write};

const ONE: &str = "[[branch]]\nname = \"a\"\nbits = 4\n";

/// Checks that quantizing fails before a block is finished, with a line that contains every word.
fn expect(scratch: &Scratch, recipe: &std::path::Path, words: &[&str]) {
    expect_late(recipe, words);
    scratch.assert_nothing_written();
}

/// Checks that quantizing fails.
fn expect_late(recipe: &std::path::Path, words: &[&str]) {
    let line = refuse(["quantize", recipe.to_str().unwrap()]);
    for word in words {
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
}

#[test]
fn a_missing_recipe_model_or_calibration_is_named() {
    let scratch = Scratch::new();
    let line = refuse(["quantize", "no/such.toml"]);
    assert!(line.contains("no/such.toml"), "{line}");
    let recipe = scratch.recipe(&scratch.path("nowhere"), ONE);
    expect(
        &scratch,
        &recipe,
        &["recipe.toml:3:10", "nowhere", "download"],
    );
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    let line = refuse([
        "quantize",
        recipe.to_str().unwrap(),
        "--calibration",
        "no.json",
    ]);
    assert!(line.contains("no.json"), "{line}");
    let line = refuse(["quantize", recipe.to_str().unwrap(), "--branch", "b"]);
    assert!(line.contains("no branch \"b\"; it has: a"), "{line}");
}

#[test]
fn a_checkpoint_without_weights_or_tokenizer_is_named() {
    for (file, word) in [
        ("model.safetensors", "no checkpoint here"),
        ("tokenizer.json", "tokenizer.json"),
        ("config.json", "config.json"),
    ] {
        let scratch = Scratch::new();
        let model = scratch.copy_model();
        fs::remove_file(model.join(file)).unwrap();
        let recipe = scratch.recipe(&model, ONE);
        expect(&scratch, &recipe, &[word]);
    }
}

#[test]
fn a_truncated_file_is_refused() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let file = model.join("model.safetensors");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let recipe = scratch.recipe(&model, ONE);
    expect(&scratch, &recipe, &["model.safetensors", "truncated"]);
}

#[test]
fn a_tensor_of_a_wrong_shape_or_dtype_is_named() {
    for (from, to, words) in [
        (
            "\"dtype\":\"F16\",\"shape\":[768,256]",
            "\"dtype\":\"F16\",\"shape\":[384,512]",
            ["[384, 512]", "[768, 256]"],
        ),
        (
            "\"dtype\":\"F16\",\"shape\":[768,256]",
            "\"dtype\":\"I16\",\"shape\":[768,256]",
            ["I16", "BF16"],
        ),
    ] {
        let scratch = Scratch::new();
        let model = scratch.copy_model();
        edit_header(&model.join("model.safetensors"), from, to);
        let recipe = scratch.recipe(&model, ONE);
        expect(
            &scratch,
            &recipe,
            &[words[0], words[1], "tensor model.layers.0.mlp."],
        );
    }
}

#[test]
fn a_missing_tensor_is_named() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    edit_header(
        &model.join("model.safetensors"),
        "layers.2.mlp.up_proj",
        "layers.2.mlp.xx_proj",
    );
    let recipe = scratch.recipe(&model, ONE);
    expect_late(&recipe, &["model.layers.2.mlp.up_proj.weight", "missing"]);
}

#[test]
fn a_non_finite_weight_is_named_with_its_count() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    edit_tensor(
        &model.join("model.safetensors"),
        "model.layers.1.mlp.up_proj.weight",
        |bytes| {
            for at in [10, 500] {
                bytes[at..at + 2].copy_from_slice(&0x7e00u16.to_le_bytes()); // NaN
            }
        },
    );
    let recipe = scratch.recipe(&model, ONE);
    expect_late(
        &recipe,
        &[
            "model.layers.1.mlp.up_proj.weight",
            "2 non-finite",
            "element 5",
        ],
    );
}

#[test]
fn a_non_finite_activation_names_the_linears_that_met_it() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    // Finite weights, but block 0 now adds more than f16 can hold to the hidden states.
    edit_tensor(
        &model.join("model.safetensors"),
        "model.layers.0.self_attn.o_proj.weight",
        |bytes| {
            for value in bytes.chunks_exact_mut(2) {
                value.copy_from_slice(&0x7bffu16.to_le_bytes()); // 65504
            }
        },
    );
    let standard = format!("[defaults]\npreset = \"standard\"\n{ONE}");
    let recipe = scratch.recipe(&model, &standard);
    expect(
        &scratch,
        &recipe,
        &[
            "branch a",
            "model.layers.0.mlp.gate_proj",
            "the residual before it has 32000 values beyond f16's range",
        ],
    );
}

#[test]
fn a_tokenizer_of_another_vocabulary_is_refused() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let config = model.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        text.replace("\"vocab_size\": 4096", "\"vocab_size\": 1000"),
    )
    .unwrap();
    // The weights belong to a model with this many tokens.
    let weights = model.join("model.safetensors");
    let mut tensors = read(&weights);
    for (name, (_, shape, bytes)) in &mut tensors {
        if ["lm_head.weight", "model.embed_tokens.weight"].contains(&name.as_str()) {
            *shape = json!([1000, 256]);
            bytes.truncate(1000 * 256 * 2);
        }
    }
    write(&weights, &tensors);
    let recipe = scratch.recipe(&model, ONE);
    expect(&scratch, &recipe, &["vocabulary of 1000", "tokenizer"]);
}

#[test]
fn too_little_text_says_how_much_is_needed() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    let line = refuse(["quantize", recipe.to_str().unwrap(), "--seq-len", "1000000"]);
    assert!(
        line.contains("need 1000000") && line.contains("seq_len of at most"),
        "{line}"
    );
    scratch.assert_nothing_written();
}

#[test]
fn a_group_size_that_does_not_divide_is_refused_before_any_work() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(
        &medi_tiny(),
        "[[branch]]\nname = \"a\"\nbits = 4\ngroup_size = 100\n",
    );
    expect(
        &scratch,
        &recipe,
        &[
            "group_size = 100",
            "256 inputs",
            "valid are -1, 32, 64, 128, 256",
        ],
    );
}

#[test]
fn an_occupied_output_directory_is_left_alone() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    let branch = scratch.out().join("a");
    fs::create_dir_all(&branch).unwrap();
    fs::write(branch.join("thesis.tex"), "years of work").unwrap();
    let line = refuse(["quantize", recipe.to_str().unwrap()]);
    assert!(
        line.contains("did not write") && line.contains("another output"),
        "{line}"
    );
    assert_eq!(
        fs::read_to_string(branch.join("thesis.tex")).unwrap(),
        "years of work"
    );
    assert_eq!(fs::read_dir(scratch.out()).unwrap().count(), 1);
}

#[test]
fn a_missing_cuda_device_is_said_plainly() {
    if fs::exists("/dev/nvidiactl").unwrap() {
        println!("skipped: this machine has a CUDA device");
        return;
    }
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    let line = refuse(["quantize", recipe.to_str().unwrap(), "--device", "cuda"]);
    assert!(
        line.contains("no CUDA device") && line.contains("--device cpu"),
        "{line}"
    );
    scratch.assert_nothing_written();
}

#[test]
fn files_over_their_limits_are_refused_unread() {
    let scratch = Scratch::new();
    let recipe = scratch.path("long.toml");
    fs::write(&recipe, "#".repeat((1 << 20) + 1)).unwrap();
    let line = refuse(["plan", recipe.to_str().unwrap()]);
    assert!(line.contains("over 1048576 bytes"), "{line}");

    // A sparse file, large only by its length.
    let model = scratch.copy_model();
    let config = fs::File::create(model.join("config.json")).unwrap();
    config.set_len(100 << 20).unwrap();
    let recipe = scratch.recipe(&model, ONE);
    expect(&scratch, &recipe, &["config.json", "33554432"]);
}

#[test]
fn what_files_say_cannot_speak_to_the_terminal() {
    let scratch = Scratch::new();
    let raw = |text: &str| text.contains(['\u{1b}', '\u{9b}', '\r', '\u{7}']);
    // An error that quotes the contents of a file, on one line.
    let model = scratch.path("a\u{1b}[2Jb\nc");
    fs::create_dir(&model).unwrap();
    let line = refuse(["inspect", model.to_str().unwrap()]);
    assert!(!raw(&line) && line.contains(r"a\u{1b}[2Jb\nc"), "{line:?}");

    // Text of several lines keeps its tabs and line ends.
    let text = "Fever.\u{1b}]0;title\u{7} A rise\r\nof the\ttemperature.\u{9b}31m ".repeat(400);
    let data = scratch.path("rows.txt");
    fs::write(&data, text.replace('\n', " ")).unwrap();
    let recipe = scratch.recipe(&medi_tiny(), ONE);
    let args = [
        "calibration",
        "show",
        recipe.to_str().unwrap(),
        "--rows",
        "0:",
    ];
    let source = ["--calibration", data.to_str().unwrap(), "--column", "text"];
    let shown = succeed(args.iter().chain(&source));
    let (_, window) = shown.split_once("first window:\n").unwrap();
    assert!(
        !raw(window) && window.contains(r"\u{1b}]0;title\u{7}"),
        "{window:?}"
    );
    assert!(window.contains('\t'), "{window:?}");
}

#[test]
fn links_of_a_model_out_of_its_directory_are_neither_read_for_ever_nor_published() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let recipe = scratch.recipe(&model, ONE);
    fs::write(scratch.path("id_rsa"), "secret").unwrap();
    symlink("../id_rsa", model.join("LICENSE")).unwrap();
    expect(
        &scratch,
        &recipe,
        &[
            "model/LICENSE",
            "outside the model's directory",
            "put a copy",
        ],
    );
    fs::remove_file(model.join("LICENSE")).unwrap();
    fs::remove_file(model.join("config.json")).unwrap();
    symlink("/dev/zero", model.join("config.json")).unwrap();
    expect(&scratch, &recipe, &["config.json", "not a regular file"]);
}
