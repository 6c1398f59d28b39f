//! Exports branches of the bundled model to every format, and compares their weights in programs that read them.
//!
//! `xtask/clients/exported.py` asks the formats' own packages, as far as the given Python has them: gguf 0.19,
//! mlx 0.32 with mlx-lm 0.32, compressed-tensors 0.20 with PyTorch and Transformers, llama-cpp-python 0.3.36.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::Value;

use crate::bench::quoted;
use crate::root;

/// Branches of every width, symmetry and group size that some format holds.
const BRANCHES: &str = r#"
[defaults]
group_size = 64
desc_act = false

[[branch]]
name = "w4g32"
bits = 4
group_size = 32

[[branch]]
name = "w4g128-static"
bits = 4
group_size = 128
desc_act = true
static_groups = true

[[branch]]
name = "w3g64"
bits = 3

[[branch]]
name = "w2g64"
bits = 2

[[branch]]
name = "w8g128"
bits = 8
group_size = 128

[[branch]]
name = "w4g-1"
bits = 4
group_size = -1

[[branch]]
name = "w4g64-asymmetric"
bits = 4
sym = false

[[branch]]
name = "mixed"
bits = 4

[[branch.override]]
match = "*.down_proj"
bits = 8
group_size = 32

[[branch.override]]
match = "*.layers.0.self_attn.k_proj"
skip = true
"#;

/// Formats, with the end of an exported branch's name.
const FORMATS: [(&str, &str); 3] = [("compressed-tensors", ""), ("mlx", ""), ("gguf", ".gguf")];

#[derive(Args)]
pub(crate) struct ExportsArgs {
    /// Python with the packages of the readers to ask
    #[arg(long)]
    python: PathBuf,
    /// The binary to export with, instead of this workspace's release build
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Directory for branches, instead of target/exports
    #[arg(long)]
    work: Option<PathBuf>,
    /// File for the table, instead of crates/gptq-format/EXPORTS.md
    #[arg(long)]
    output: Option<PathBuf>,
}

pub(crate) fn run(args: &ExportsArgs) -> anyhow::Result<()> {
    let work = match &args.work {
        Some(work) => std::path::absolute(work)?,
        None => root().join("target/exports"),
    };
    if work.exists() {
        std::fs::remove_dir_all(&work)?;
    }
    std::fs::create_dir_all(&work)?;
    let built = root().join("target/release/gptq");
    let gptq = args.binary.as_ref().unwrap_or(&built);
    let (branches, exported) = (work.join("branches"), work.join("exported"));
    quantize(gptq, &work, &branches)?;
    let mut refused = Vec::new();
    for entry in std::fs::read_dir(&branches)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !branches.join(&name).join("config.json").exists() {
            continue;
        }
        for (format, end) in FORMATS {
            let output = Command::new(gptq)
                .arg("export")
                .arg(branches.join(&name))
                .args(["--to", format, "--output"])
                .arg(exported.join(format).join(format!("{name}{end}")))
                .output()?;
            if !output.status.success() {
                let why = String::from_utf8_lossy(&output.stderr);
                let why = why.lines().last().unwrap_or_default();
                let why = why.rsplit(": ").next().unwrap_or_default().to_owned();
                refused.push(format!("| {name} | {format} | | refused: {why} | |"));
            }
        }
    }
    let output = Command::new(&args.python)
        .arg(root().join("xtask/clients/exported.py"))
        .args([&branches, &exported])
        .output()
        .with_context(|| args.python.display().to_string())?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    let text = String::from_utf8(output.stdout)?;
    let lines = text.lines().map(serde_json::from_str);
    let lines: Vec<Value> = lines.collect::<Result<_, _>>()?;
    let path = args.output.clone();
    let path = path.unwrap_or_else(|| root().join("crates/gptq-format/EXPORTS.md"));
    std::fs::write(&path, document(&lines, &refused)?)?;
    let wrong = |line: &&Value| line["differing"] != 0;
    let wrong: Vec<String> = lines.iter().filter(wrong).map(Value::to_string).collect();
    ensure!(wrong.is_empty(), "failed: {}", wrong.join(", "));
    Ok(())
}

fn quantize(gptq: &Path, work: &Path, branches: &Path) -> anyhow::Result<()> {
    let model = root().join("tests/models/medi-tiny");
    let text = root().join("calibration/wikidoc/wikidoc_patient_information_1000.json");
    let [model, text, branches] = [model.as_path(), text.as_path(), branches].map(quoted);
    let recipe = work.join("recipe.toml");
    std::fs::write(
        &recipe,
        format!(
            "[model]\nsource = {model}\n\n[calibration]\nsource = {text}\nrows = \"0:100\"\nsamples = 4\n\
             seq_len = 256\n\n[output]\ndir = {branches}\n{BRANCHES}"
        ),
    )?;
    let output = Command::new(gptq)
        .arg("quantize")
        .arg(&recipe)
        .args(["--device", "cpu"])
        .current_dir(root())
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{said}");
    Ok(())
}

fn document(lines: &[Value], refused: &[String]) -> anyhow::Result<String> {
    let mut text = "# Exported branches in the formats' own packages\n\n\
                    Written by `cargo xtask exports`: branches of medi-tiny, every weight of their linear layers compared with \
                    `scale * (code - zero)` in f32.\n\n\
                    | branch | format | package | weights that differ | loads |\n|---|---|---|---|---|\n"
        .to_owned();
    for line in lines {
        let of = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
        let differing = match line["error"].as_str() {
            Some(error) => error.to_owned(),
            None => line["differing"].to_string(),
        };
        let loads = match line["loads"].as_bool() {
            Some(true) => "yes",
            Some(false) => "no",
            None => "not tried",
        };
        let (branch, reader, version) = (of("branch"), of("reader"), of("version"));
        writeln!(
            text,
            "| {branch} | {reader} | {version} | {differing} | {loads} |"
        )?;
    }
    for line in refused {
        writeln!(text, "{line}")?;
    }
    Ok(text)
}
