//! Changes between two runs on one output directory are named, and the second run does nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::{Scratch, edit_tensor, medi_tiny, refused, succeeded};
use crate::resume::{QUICK, SLOW, TWO, killed_after_a_block, quantize, start, wait};

#[test]
fn a_changed_recipe_model_or_calibration_is_named_and_restart_begins_anew() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let recipe = scratch.recipe(&model, TWO);
    killed_after_a_block(&recipe, &scratch.out(), &SLOW);
    let (text, bytes) = (
        fs::read_to_string(&recipe).unwrap(),
        fs::read(model.join("model.safetensors")).unwrap(),
    );
    let refuse = |flags: &[&str], words: &[&str]| {
        let line = refused(
            quantize(&recipe, &[&SLOW[..], flags].concat())
                .output()
                .unwrap(),
        );
        for word in words.iter().chain(&["--restart", "interrupted"]) {
            assert!(line.contains(word), "no {word:?} in: {line}");
        }
    };
    refuse(&["--seed", "7"], &["calibration.seed was 0, is 7"]);
    refuse(&["--branch", "a"], &["branch b was asked for, is not"]);
    fs::write(&recipe, text.replace("bits = 4", "bits = 8")).unwrap();
    refuse(&[], &["branch a", "branch.bits was 4, is 8"]);
    let bf16 = text.replace("[model]", "[model]\ndtype = \"bf16\"");
    fs::write(&recipe, bf16).unwrap();
    refuse(&[], &["model.dtype was \"f16\", is \"bf16\""]);
    fs::write(&recipe, format!("propagate = \"dense\"\n{text}")).unwrap();
    refuse(&[], &["propagate was \"quantised\", is \"dense\""]);
    fs::write(&recipe, &text).unwrap();
    // The middle of the last tensor, in place.
    let mut other = bytes.clone();
    let header = 8 + u64::from_le_bytes(other[..8].try_into().unwrap()) as usize;
    let at = header + (other.len() - header) / 2;
    for byte in &mut other[at..] {
        *byte &= 0x3b;
    }
    fs::write(model.join("model.safetensors"), &other).unwrap();
    let words = [
        "the weights of block 0",
        "model.safetensors was \"8919664 bytes, written 20",
    ];
    refuse(&[], &words);
    fs::write(model.join("model.safetensors"), &bytes).unwrap();

    fs::write(&recipe, text.replace("bits = 4", "bits = 8")).unwrap();
    let said = quantize(&recipe, &[&SLOW[..], &["--restart"]].concat()).output();
    assert!(!succeeded(said.unwrap()).contains("resuming"));
    let line = refused(
        quantize(&recipe, &[&SLOW[..], &["--seed", "7"]].concat())
            .output()
            .unwrap(),
    );
    assert!(
        line.contains("out/a") && line.contains("--restart"),
        "{line}"
    );
}

#[test]
fn a_shard_repaired_behind_the_finished_blocks_does_not_end_the_unfinished_run() {
    // The files of a fresh run on the model that the repaired run ends with.
    let repaired = |model: &Path| {
        let weights = model.join("model.safetensors");
        for name in ["model.layers.2.mlp.down_proj.weight", "model.norm.weight"] {
            edit_tensor(&weights, name, |bytes| {
                for byte in bytes {
                    *byte &= 0xbf;
                }
            });
        }
    };
    let tensors = |scratch: &Scratch| {
        ["a", "b"].map(|it| fs::read(scratch.out().join(it).join("model.safetensors")).unwrap())
    };
    let whole = Scratch::new();
    let model = whole.copy_model();
    repaired(&model);
    let recipe = whole.recipe(&model, TWO);
    succeeded(quantize(&recipe, &SLOW).output().unwrap());

    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let recipe = scratch.recipe(&model, TWO);
    killed_after_a_block(&recipe, &scratch.out(), &SLOW);
    assert!(
        crate::resume::blocks(&scratch.out()) < 3,
        "killed before the last block"
    );
    repaired(&model);
    let said = succeeded(quantize(&recipe, &SLOW).output().unwrap());
    assert!(said.contains("resuming after block"), "{said}");
    assert!(tensors(&scratch) == tensors(&whole));
}

#[test]
fn a_model_changed_in_one_byte_is_no_longer_that_of_a_finished_branch() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let one = "[[branch]]\nname = \"a\"\nbits = 4\n";
    let recipe = scratch.recipe(&model, one);
    let run = || quantize(&recipe, &QUICK).output().unwrap();
    succeeded(run());
    // At the beginning of a tensor: the fingerprint covers only the middle of each tensor.
    let weights = model.join("model.safetensors");
    let flip = || edit_tensor(&weights, "model.embed_tokens.weight", |bytes| bytes[0] ^= 1);
    flip();
    let line = refused(run());
    for word in ["out/a", "model.model.safetensors.sha256 was", "--restart"] {
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
    // An older report without such a record cannot detect it.
    let path = scratch.out().join("a/report.json");
    let whole = fs::read(&path).unwrap();
    let mut report: Value = serde_json::from_slice(&whole).unwrap();
    let files = report.as_object_mut().unwrap().remove("model_files");
    assert_eq!(files.unwrap().as_object().unwrap().len(), 1);
    fs::write(&path, report.to_string()).unwrap();
    assert!(succeeded(run()).contains("a: already finished, skipped"));
    // The same bytes, written at another time.
    fs::write(&path, whole).unwrap();
    flip();
    assert!(succeeded(run()).contains("a: already finished, skipped"));
}

#[test]
fn a_changed_calibration_file_is_named_for_finished_and_unfinished_branches() {
    let scratch = Scratch::new();
    let rows = scratch.path("rows.json");
    let source = "calibration/wikidoc/wikidoc_patient_information_1000.json";
    let bytes = fs::read(crate::harness::root().join(source)).unwrap();
    // A letter of the last row, which no window reaches.
    let mut other = bytes.clone();
    let last = other.iter_mut().rfind(|byte| byte.is_ascii_lowercase());
    *last.unwrap() ^= 2;
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    let text = fs::read_to_string(&recipe).unwrap();
    fs::write(&recipe, text.replace(source, rows.to_str().unwrap())).unwrap();
    let run = || quantize(&recipe, &SLOW).output().unwrap();
    let refuse = |left: &str| {
        fs::write(&rows, &other).unwrap();
        let line = refused(run());
        for word in [
            left,
            "calibration.files.0.sha256 (rows.json) was",
            "--restart",
        ] {
            assert!(line.contains(word), "no {word:?} in: {line}");
        }
        fs::write(&rows, &bytes).unwrap();
    };
    fs::write(&rows, &bytes).unwrap();
    killed_after_a_block(&recipe, &scratch.out(), &SLOW);
    refuse("interrupted");
    assert!(succeeded(run()).contains("resuming after block"));
    refuse("out/a");
    assert!(succeeded(run()).contains("b: already finished, skipped"));
}

#[test]
fn a_journal_whose_linears_are_not_those_of_the_plan_is_refused() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    killed_after_a_block(&recipe, &scratch.out(), &SLOW);
    let path = scratch.out().join(".gptq-journal.jsonl");
    let whole = fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = whole.split_inclusive('\n').collect();
    let linear = "model.layers.0.self_attn.k_proj";
    for (key, value, why) in [
        ("shape", json!([256, 128]), "not as planned"),
        ("shape", json!([0, 256]), "shape = [0, 256]"),
        ("bits", json!(8), "not as planned"),
        ("layer", json!(1), "not as planned"),
        (
            "name",
            json!("model.layers.0.self_attn.q_proj"),
            "there twice",
        ),
        (
            "name",
            json!("model.layers.0.self_attn.x_proj"),
            "not as planned",
        ),
    ] {
        let mut block: Value = serde_json::from_str(lines[1]).unwrap();
        let linears = block["branches"]["a"]["linears"].as_array_mut().unwrap();
        let found = linears.iter_mut().find(|it| it["name"] == linear);
        found.unwrap()[key] = value;
        let rest = lines[2..].concat();
        fs::write(&path, format!("{}{block}\n{rest}", lines[0])).unwrap();
        let line = refused(quantize(&recipe, &SLOW).output().unwrap());
        for word in ["branch a", why, "--restart"] {
            assert!(line.contains(word), "no {word:?} in: {line}");
        }
    }
}

#[test]
fn a_run_goes_on_with_a_copy_of_the_program_and_not_with_another() {
    let scratch = Scratch::new();
    let recipe = scratch.recipe(&medi_tiny(), TWO);
    killed_after_a_block(&recipe, &scratch.out(), &SLOW);
    // The other has another first byte in its build ID, which follows its note's head: lengths 4 and 20, kind 3, "GNU".
    // A separate process copies it: a file open for writing in a test's thread would also be open in child processes
    // started by other tests, and could not be executed.
    let program = fs::read(env!("CARGO_BIN_EXE_gptq")).unwrap();
    let head = b"\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0";
    let note = program.windows(head.len()).position(|it| it == head);
    let place = note.expect("the linker writes a build ID") + head.len();
    let byte = format!("\\{:03o}", !program[place]);
    let (same, other) = (scratch.path("same"), scratch.path("other"));
    let script = "cp \"$0\" \"$1\"; cp \"$0\" \"$2\"; printf \"$4\" | dd of=\"$2\" bs=1 seek=\"$3\" conv=notrunc";
    let mut copy = Command::new("sh");
    copy.args(["-c", script, env!("CARGO_BIN_EXE_gptq")]);
    copy.args([&same, &other]).args([&place.to_string(), &byte]);
    succeeded(copy.output().unwrap());
    let run = |program: &Path| {
        let mut command = Command::new(program);
        command.args(["quantize", recipe.to_str().unwrap()]);
        let command = command.args(SLOW).current_dir(crate::harness::root());
        command.output().unwrap()
    };
    let line = refused(run(&other));
    assert!(line.contains("gptq.program was"), "{line}");
    assert!(succeeded(run(&same)).contains("resuming after block"));
}

#[test]
fn a_model_that_becomes_shorter_ends_a_run_with_a_line() {
    let scratch = Scratch::new();
    let model = scratch.copy_model();
    let recipe = scratch.recipe(&model, TWO);
    let child = start(quantize(&recipe, &SLOW));
    wait("the journal", || {
        scratch.out().join(".gptq-journal.jsonl").exists()
    });
    let weights = fs::OpenOptions::new()
        .write(true)
        .open(model.join("model.safetensors"))
        .unwrap();
    weights.set_len(4096).unwrap();
    let line = refused(child.wait_with_output().unwrap());
    for word in ["model/model.safetensors: was truncated", "same command"] {
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
}
