//! Hostile checkpoints: one line, status 1, nothing executed, nothing written.

use std::fs;
use std::path::Path;

use crate::harness::{Scratch, refuse, root};

/// Checks medi-tiny with its weights replaced by `file` from `tests/golden/bin`.
fn expect(file: &str, words: &[&str]) {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    fs::remove_file(model.join("model.safetensors")).unwrap();
    let bytes = fs::read(root().join("tests/golden/bin").join(file)).unwrap();
    fs::write(model.join("pytorch_model.bin"), bytes).unwrap();
    quantizing_fails(&scratch, &model, words);
}

fn quantizing_fails(scratch: &Scratch, model: &Path, words: &[&str]) {
    let recipe = scratch.recipe(model, "[[branch]]\nname = \"a\"\nbits = 4\n");
    let line = refuse(["quantize", recipe.to_str().unwrap()]);
    for word in words {
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
    scratch.assert_nothing_written();
}

#[test]
fn a_pickle_that_runs_a_command_is_refused_and_runs_nothing() {
    expect(
        "os_system.bin",
        &[
            "pytorch_model.bin",
            "\"posix.system\"",
            "nothing was executed",
        ],
    );
    // The pickle's command would have run in the tests' working directory.
    assert!(!root().join("gptq-os-system-was-here").exists());
}

#[test]
fn a_compressed_or_legacy_file_is_refused_with_the_remedy() {
    expect("deflated.bin", &["pytorch_model.bin", "is compressed"]);
    expect(
        "legacy.bin",
        &[
            "pytorch_model.bin",
            "before PyTorch 1.6",
            "torch.save(torch.load(",
        ],
    );
}

#[test]
fn a_file_of_other_tensors_names_the_missing_one() {
    expect("dtypes.bin", &["model.", "is missing"]);
}

#[test]
fn an_index_that_leads_elsewhere_is_refused() {
    for index in [
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ] {
        let scratch = Scratch::new();
        let model = scratch.copy_model();
        fs::remove_file(model.join("model.safetensors")).unwrap();
        let text = r#"{"weight_map": {"model.norm.weight": "../../etc/passwd"}}"#;
        fs::write(model.join(index), text).unwrap();
        quantizing_fails(
            &scratch,
            &model,
            &[index, "../../etc/passwd", "not to a file name"],
        );
    }
}

#[test]
fn an_lfs_pointer_is_named_as_such() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8919664\n";
    fs::write(model.join("model.safetensors"), pointer).unwrap();
    quantizing_fails(&scratch, &model, &["Git LFS pointer", "git lfs pull"]);
}

#[test]
fn an_unknown_model_type_lists_the_known_ones() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let config = model.join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace("\"model_type\": \"llama\"", "\"model_type\": \"mamba\"");
    fs::write(&config, text).unwrap();
    quantizing_fails(
        &scratch,
        &model,
        &["\"mamba\"", "llama, mistral, mistral3, mixtral, olmo2"],
    );
}
