//! `gptq card`.

use std::fs;
use std::path::PathBuf;

use crate::harness::{Scratch, medi_tiny, refuse, root, succeed};

/// Makes a finished matrix of one branch.
fn matrix(scratch: &Scratch) -> PathBuf {
    let recipe = scratch.recipe(&medi_tiny(), "[[branch]]\nname = \"main\"\nbits = 4\n");
    succeed(["quantize", recipe.to_str().unwrap()]);
    scratch.out()
}

#[test]
fn a_card_is_written_once_and_an_edited_one_is_kept() {
    let scratch = Scratch::new();
    let out = matrix(&scratch);
    let card = [
        "card",
        out.to_str().unwrap(),
        "--repo",
        "user/medi-tiny-GPTQ",
    ];
    let readme = out.join("README.md");
    succeed(card);
    let text = fs::read_to_string(&readme).unwrap();
    let size = fs::metadata(out.join("main/model.safetensors"))
        .unwrap()
        .len();
    let size = format!("| {:.2} MB |", size as f64 / 1e6);
    assert!(text.starts_with("---\n") && text.contains(&size), "{text}");
    assert!(!text.contains(root().canonicalize().unwrap().to_str().unwrap()));
    succeed(card);
    fs::write(&readme, "mine").unwrap();
    let line = refuse(card);
    assert!(line.contains("--force"), "{line}");
    assert_eq!(fs::read_to_string(&readme).unwrap(), "mine");
    succeed(card.into_iter().chain(["--force"]));
    assert_eq!(fs::read_to_string(&readme).unwrap(), text);
    let template = scratch.path("own.md");
    fs::write(&template, "{{ nothing }}").unwrap();
    let line = refuse(
        card.into_iter()
            .chain(["--card-template", template.to_str().unwrap()]),
    );
    assert!(line.contains("own.md: undefined value"), "{line}");
    let facts: serde_json::Value =
        serde_json::from_str(&succeed(card.into_iter().chain(["--json"]))).unwrap();
    assert_eq!(facts["branches"][0]["name"], "main");
}
