//! Checks that the compiler does not make: the top level, dependencies between crates, sources and
//! licences of dependencies, and style.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::ensure;

use crate::root;

/// Entries of the top level, except dotfiles, `target/` and `out/`.
const TOP_LEVEL: [&str; 13] = [
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "calibration",
    "configs",
    "crates",
    "findings",
    "fuzz",
    "kernels",
    "tests",
    "xtask",
];

/// Crates from the bottom up: each may use only those before it.
const ORDER: [(&str, &str); 17] = [
    ("gptq-format", "crates/gptq-format"),
    ("gptq-solver", "crates/gptq-solver"),
    ("gptq-spec", "crates/gptq-spec"),
    ("gptq-calibration", "crates/gptq-calibration"),
    ("gptq-ranks", "crates/gptq-ranks"),
    ("gptq-plan", "crates/gptq-plan"),
    ("gptq-export", "crates/gptq-export"),
    ("gptq-eval", "crates/gptq-eval"),
    ("gptq-report", "crates/gptq-report"),
    ("gptq-hub", "crates/gptq-hub"),
    ("gptq-kernels", "kernels"),
    ("gptq-model", "crates/gptq-model"),
    ("gptq-generate", "crates/gptq-generate"),
    ("gptq-likelihood", "crates/gptq-likelihood"),
    ("gptq-run", "crates/gptq-run"),
    ("gptq-verify", "crates/gptq-verify"),
    ("gptq", "crates/gptq"),
];

/// Dependencies that are forbidden although the order allows them.
const FORBIDDEN: [(&str, &str); 2] = [("gptq-verify", "gptq-solver"), ("gptq-verify", "gptq-run")];

const LONGEST_FILE: usize = 500;
const VAGUE_NAMES: [&str; 5] = ["utils.rs", "util.rs", "common.rs", "base.rs", "helpers.rs"];

/// Prints every complaint; errors if there is any.
pub(crate) fn run() -> anyhow::Result<()> {
    let complaints = complaints(&root())?;
    for complaint in &complaints {
        eprintln!("{complaint}");
    }
    ensure!(complaints.is_empty(), "{} complaint(s)", complaints.len());
    println!("tidy");
    Ok(())
}

fn complaints(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = top_level(root)?;
    found.extend(dependencies(root)?);
    found.extend(crate::dependencies::complaints(root)?);
    found.extend(crate::design::complaints(root, &ORDER)?);
    for dir in [
        "crates",
        "fuzz/fuzz_targets",
        "fuzz/src",
        "kernels",
        "tests",
        "xtask",
    ] {
        for file in rust_files(&root.join(dir))? {
            let name = file.strip_prefix(root)?.display().to_string();
            found.extend(style(&name, &fs::read_to_string(&file)?));
        }
    }
    Ok(found)
}

fn top_level(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(root)? {
        names.insert(entry?.file_name().to_string_lossy().into_owned());
    }
    let expected = BTreeSet::from(TOP_LEVEL.map(String::from));
    let extra = names
        .difference(&expected)
        .filter(|n| !n.starts_with('.') && !["target", "out"].contains(&n.as_str()))
        .map(|n| format!("{n}: not part of the top level"));
    let missing = expected
        .difference(&names)
        .map(|n| format!("{n}: missing at the top level"));
    Ok(extra.chain(missing).collect())
}

fn dependencies(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for (i, (name, dir)) in ORDER.iter().enumerate() {
        let manifest = fs::read_to_string(root.join(dir).join("Cargo.toml"))?;
        let manifest: toml::Table = manifest.parse()?;
        let uses: Vec<&str> = ["dependencies", "dev-dependencies", "build-dependencies"]
            .into_iter()
            .filter_map(|kind| manifest.get(kind)?.as_table())
            .flat_map(|table| table.keys().map(String::as_str))
            .collect();
        for (above, _) in &ORDER[i + 1..] {
            if uses.contains(above) && above != name {
                found.push(format!("{dir}: {name} uses {above}, which is above it"));
            }
        }
        for (_, forbidden) in FORBIDDEN.iter().filter(|(who, _)| who == name) {
            if uses.contains(forbidden) {
                found.push(format!("{dir}: {name} must not use {forbidden}"));
            }
        }
    }
    Ok(found)
}

/// Returns the Rust files below `dir`, sorted.
pub(crate) fn rust_files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn style(name: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut complain = |what: &str| found.push(format!("{name}: {what}"));
    if !text.starts_with("//!") {
        complain("does not open with //!");
    }
    if text.lines().count() > LONGEST_FILE && !text.contains("Longer than most") {
        complain("over 500 lines, and does not say why (\"Longer than most: ...\")");
    }
    if VAGUE_NAMES.iter().any(|v| name.ends_with(&format!("/{v}"))) {
        complain("the file name is too vague");
    }
    // Split in two so that this file does not complain about itself.
    for (half, rest) in [
        ("todo", "!("),
        ("unimplemented", "!("),
        ("dbg", "!("),
        ("#[ign", "ore"),
        ("FIX", "ME"),
    ] {
        if text.contains(&format!("{half}{rest}")) {
            complain(&format!("left over: {half}{rest}"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repository_is_tidy() {
        assert_eq!(complaints(&root()).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn untidy_files_are_complained_about() {
        let half = "todo";
        let text = format!("fn main() {{ {half}!() }}\n{}", "\n".repeat(501));
        assert_eq!(style("crates/a/src/utils.rs", &text).len(), 4);
        assert!(style("crates/a/src/sweep.rs", "//! The sweep.\n").is_empty());
    }
}
