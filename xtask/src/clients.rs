//! Loads a 4-bit branch of every model family with Transformers and GPTQModel, and compares logits with
//! those of the dequantized weights.
//!
//! The families are the fixtures in `tests/golden/families`. Each becomes two branches: one of 4 bits
//! throughout, and one whose overrides end up in `dynamic`. `xtask/clients/load.py` runs the readers and
//! says how it compares; `xtask/clients/requirements.txt` has their versions.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::Value;

use crate::bench::quoted;
use crate::root;

/// Maximum difference of a logit. The factor of Gemma's embeddings, which readers round to f16, takes
/// up a fifth of it.
const TOLERANCE: f64 = 2e-2;

/// A branch of one setting, and one with an override to other bits and one to none; `DOWN` stands for the name of down
/// projections.
const BRANCHES: &str = r#"
[defaults]
bits = 4
group_size = 32

[[branch]]
name = "plain"

[[branch]]
name = "overrides"

[[branch.override]]
match = "*.DOWN"
bits = 8

[[branch.override]]
match = "*.layers.0.self_attn.*"
skip = true
"#;

/// Columns of the table: the reader as `load.py` calls it, and the branch.
const COLUMNS: [(&str, &str); 3] = [
    ("transformers", "plain"),
    ("gptqmodel", "plain"),
    ("gptqmodel", "overrides"),
];

/// Reader and model type that do not go together, whoever wrote the files, and why.
const UNREAD: [(&str, &[&str], &str); 3] = [
    (
        "transformers",
        &["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe"],
        "has the experts of a block in one tensor and looks for no packed ones: their weights stay as they were initialized, \
         without an error",
    ),
    (
        "gptqmodel",
        &["qwen2_moe"],
        "looks for no packed weights in the dense block (`mlp_only_layers`) of a mixture: they stay uninitialized, without an error",
    ),
    (
        "gptqmodel",
        &["glm4_moe"],
        "stops at the first forward, in its own replacement of the block",
    ),
];

#[derive(Args)]
pub(crate) struct ClientsArgs {
    /// Description of the machine, for the document
    #[arg(long)]
    machine: String,
    /// The binary to quantize with, instead of this workspace's release build
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Python to make the readers' environment with
    #[arg(long, default_value = "python3.11")]
    python: PathBuf,
    /// Directory for the environment (6 GB, kept for the next run) and branches, instead of target/clients
    #[arg(long)]
    work: Option<PathBuf>,
    /// Directory for CLIENTS.md, instead of crates/gptq-format
    #[arg(long)]
    output: Option<PathBuf>,
}

/// Results of `load.py` by reader, fixture and branch.
type Results = BTreeMap<(String, String), Value>;

pub(crate) fn run(args: &ClientsArgs) -> anyhow::Result<()> {
    let work = match &args.work {
        Some(work) => std::path::absolute(work)?,
        None => root().join("target/clients"),
    };
    let python = environment(&args.python, &work)?;
    let built = root().join("target/release/gptq");
    let gptq = args.binary.as_ref().unwrap_or(&built);
    let mut types = BTreeMap::new();
    for fixture in fixtures()? {
        let model_type = quantize(gptq, &fixture, &work).with_context(|| fixture.clone())?;
        types.insert(fixture, model_type);
    }
    let (mut versions, mut results) = (Value::Null, Results::new());
    for reader in ["transformers", "gptqmodel"] {
        let branches = COLUMNS.into_iter().filter(|it| it.0 == reader);
        let branches = branches.flat_map(|(_, branch)| {
            types
                .keys()
                .map(move |fixture| format!("{fixture}/{branch}"))
        });
        for line in load(&python, reader, &work, branches)? {
            match line["branch"].as_str() {
                None => versions = line["versions"].clone(),
                Some(branch) => {
                    results.insert((reader.to_owned(), branch.to_owned()), line);
                }
            }
        }
    }
    let output = args.output.clone();
    let output = output.unwrap_or_else(|| root().join("crates/gptq-format"));
    let text = document(args, &versions, &types, &results)?;
    std::fs::write(output.join("CLIENTS.md"), text)?;
    let unexpected: Vec<String> = (types.iter())
        .flat_map(|(fixture, model_type)| COLUMNS.map(|column| (fixture, model_type, column)))
        .filter(|(fixture, model_type, column)| {
            passed(result(&results, fixture, *column)) == unread(column.0, model_type).is_some()
        })
        .map(|(fixture, _, (reader, branch))| format!("{reader} {fixture}/{branch}"))
        .collect();
    ensure!(
        unexpected.is_empty(),
        "not as expected: {}",
        unexpected.join(", ")
    );
    Ok(())
}

/// Returns the reason why a reader does not load a model type, where it is known.
fn unread(reader: &str, model_type: &str) -> Option<&'static str> {
    let known = UNREAD.iter();
    let mut known = known.filter(|(who, types, _)| *who == reader && types.contains(&model_type));
    known.next().map(|(_, _, why)| *why)
}

/// Makes a virtual environment with the pinned packages, unless `work` has one, and returns its Python.
fn environment(python: &Path, work: &Path) -> anyhow::Result<PathBuf> {
    let (venv, pinned) = (
        work.join("venv"),
        root().join("xtask/clients/requirements.txt"),
    );
    let (own, installed) = (venv.join("bin/python"), venv.join("requirements.txt"));
    let wanted = std::fs::read(&pinned)?;
    if std::fs::read(&installed).is_ok_and(|found| found == wanted) {
        return Ok(own);
    }
    eprintln!("installing the pinned packages into {}", venv.display());
    succeed(
        Command::new(python)
            .args(["-m", "venv", "--clear"])
            .arg(&venv),
    )?;
    let mut pip = Command::new(&own);
    pip.args(["-m", "pip", "install", "--requirement"])
        .arg(&pinned);
    succeed(&mut pip)?;
    std::fs::write(&installed, wanted)?;
    Ok(own)
}

/// Returns the names of the fixtures, in order.
fn fixtures() -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root().join("tests/golden/families"))? {
        let path = entry?.path();
        if path.join("config.json").exists() {
            let name = path.file_name().unwrap_or_default();
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Quantizes both branches of a fixture into `work/branches/FIXTURE`, and returns its model type.
fn quantize(gptq: &Path, fixture: &str, work: &Path) -> anyhow::Result<String> {
    let families = root().join("tests/golden/families");
    let (model, branches) = (
        work.join("models").join(fixture),
        work.join("branches").join(fixture),
    );
    for dir in [&model, &branches] {
        if dir.exists() {
            std::fs::remove_dir_all(dir)?;
        }
        std::fs::create_dir_all(dir)?;
    }
    let config = std::fs::read_to_string(families.join(fixture).join("config.json"))?;
    // GPTQModel would take for padding a token that Transformers adds to the tokenizer of qwen2,
    // which is beyond the fixture's vocabulary.
    let config = config.replace(r#""pad_token_id": null"#, r#""pad_token_id": 0"#);
    std::fs::write(model.join("config.json"), &config)?;
    for file in [
        &*format!("{fixture}/model.safetensors"),
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        let name = file.rsplit('/').next().unwrap_or(file);
        std::fs::copy(families.join(file), model.join(name))?;
    }
    let parsed: Value = serde_json::from_str(&config)?;
    let model_type = parsed["model_type"].as_str();
    let model_type = model_type.context("no model_type")?.to_owned();
    let down = match &*model_type {
        "mixtral" => "w2",
        _ => "down_proj",
    };
    let settings = BRANCHES.replace("DOWN", down);
    let text = root().join("calibration/wikidoc/wikidoc_patient_information_1000.json");
    let [model, text, branches] = [&model, &text, &branches].map(|path| quoted(path));
    let recipe = work.join("recipe.toml");
    std::fs::write(
        &recipe,
        format!(
            "[model]\nsource = {model}\n\n[calibration]\nsource = {text}\nrows = \"0:100\"\nsamples = 4\n\
             seq_len = 64\n\n[output]\ndir = {branches}\n{settings}"
        ),
    )?;
    let mut command = Command::new(gptq);
    succeed(
        command
            .arg("quantize")
            .arg(&recipe)
            .args(["--device", "cpu"]),
    )?;
    Ok(model_type)
}

/// Runs a command; an error has what it wrote to standard error.
fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let done = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    ensure!(
        done.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(())
}

/// Runs `load.py` with one reader, its output in `work/READER.log`, and returns its results.
fn load(
    python: &Path,
    reader: &str,
    work: &Path,
    branches: impl Iterator<Item = String>,
) -> anyhow::Result<Vec<Value>> {
    eprintln!("{reader}: loading every branch");
    let (results, log) = (
        work.join(format!("{reader}.jsonl")),
        work.join(format!("{reader}.log")),
    );
    let status = Command::new(python)
        .arg(root().join("xtask/clients/load.py"))
        .arg(reader)
        .arg(root().join("tests/golden/families"))
        .arg(&results)
        .args(branches.map(|branch| work.join("branches").join(branch)))
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&log)?)
        .status()?;
    ensure!(
        status.success(),
        "{reader}: {status}; see {}",
        log.display()
    );
    let text = std::fs::read_to_string(&results)?;
    let lines = text.lines().map(serde_json::from_str);
    Ok(lines.collect::<Result<_, _>>()?)
}

fn result<'a>(results: &'a Results, fixture: &str, (reader, branch): (&str, &str)) -> &'a Value {
    let key = (reader.to_owned(), format!("{fixture}/{branch}"));
    results.get(&key).unwrap_or(&Value::Null)
}

fn passed(result: &Value) -> bool {
    let difference = result["difference"].as_f64();
    difference.is_some_and(|it| it < TOLERANCE)
}

fn document(
    args: &ClientsArgs,
    versions: &Value,
    types: &BTreeMap<String, String>,
    results: &Results,
) -> anyhow::Result<String> {
    let version = |name: &str| versions[name].as_str().unwrap_or("unknown");
    let mut text = format!(
        "# Model families in real readers\n\n\
         Written by `cargo xtask clients` on {date}. {machine}; Python {python}, PyTorch {torch}.\n\n\
         | reader | loads by | versions |\n|---|---|---|\n\
         | Transformers | `from_pretrained` of `AutoModelForCausalLM`, or `AutoModelForImageTextToText` with a vision tower | \
         Transformers {transformers}, Optimum {optimum}, GPTQModel {gptqmodel} |\n\
         | GPTQModel | `GPTQModel.load` | GPTQModel {gptqmodel}, Transformers {transformers} |\n\n\
         Two branches of each fixture in `tests/golden/families`: 4 bits in groups of 32, and the same with overrides (`down_proj` \
         8 bits, the attention of block 0 unquantized), with which Transformers stops at mismatched sizes. A number is the largest \
         difference of a logit from Transformers in f32 with the weights of the files, dequantized by `xtask/clients/load.py`; \
         {TOLERANCE} is the limit. Readers load in f16 and then compute in f32, where GPTQModel's kernels dequantize: in f16, the \
         same dense weights alone differ by 0.07 to 0.19 (four of the fixtures). *Moved* is the largest change that quantization \
         makes to a logit; these models are random.\n\n\
         | fixture | `model_type` | layers | moved | Transformers | GPTQModel | GPTQModel, overrides |\n|---|---|---|---|---|---|---|\n",
        date = version("date"),
        machine = args.machine,
        python = version("python"),
        torch = version("torch"),
        transformers = version("transformers"),
        optimum = version("optimum"),
        gptqmodel = version("gptqmodel"),
    );
    let mut messages = String::new();
    for (fixture, model_type) in types {
        let all = COLUMNS.map(|column| result(results, fixture, column));
        let moved = all[0]["moved"].as_f64().unwrap_or(f64::NAN);
        let cells = [0, 1, 2].map(|at| match unread(COLUMNS[at].0, model_type) {
            Some(_) => "not read".to_owned(),
            None => cell(all[at]),
        });
        let cells = cells.join(" | ");
        writeln!(
            text,
            "| {fixture} | {model_type} | {} | {moved:.1} | {cells} |",
            all[0]["quantized"]
        )?;
        for ((reader, branch), result) in COLUMNS.iter().zip(all) {
            if unread(reader, model_type).is_some() {
                continue;
            }
            if let Some(why) = result["error"].as_str().or(result["adapted"].as_str()) {
                writeln!(messages, "- {reader} {fixture}/{branch}: `{why}`")?;
            }
        }
    }
    if !messages.is_empty() {
        text += "\nWith \\*, the reader refuses the files and takes a copy whose tensors have the names that it has in memory. \
                 `GPTQModel.load` does not go by Transformers' mapping of names: it wants `model.language_model.` for the \
                 published `language_model.model.` (Transformers takes either), the halves of `gate_up_proj` (with which \
                 Transformers fails at the first forward), and for Mixtral `mlp.experts.E.gate_proj` and so on in place of the \
                 published `block_sparse_moe.experts.E.w1`.\n\n";
        text += &messages;
    }
    text += "\n*Not read*, whichever program wrote the files:\n\n";
    for (reader, types, why) in UNREAD {
        writeln!(text, "- {reader}, {}: {why}.", types.join(", "))?;
    }
    Ok(text)
}

fn cell(result: &Value) -> String {
    let mark = if result["adapted"].is_null() {
        ""
    } else {
        " \\*"
    };
    match result["difference"].as_f64() {
        Some(0.0) => format!("0{mark}"),
        Some(difference) => format!("{difference:.1e}{mark}"),
        None => "fails".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_result_passes_below_the_tolerance_and_only_if_there_is_one() {
        assert!(passed(&json!({"difference": 0.0})));
        assert!(!passed(&json!({"difference": 0.02})));
        assert!(!passed(&json!({"error": "ValueError"})));
        assert!(!passed(&Value::Null));
    }

    #[test]
    fn cells_show_differences_and_what_was_adapted() {
        assert_eq!(cell(&json!({"difference": 0.0})), "0");
        let adapted = json!({"difference": 0.0034, "adapted": "ValueError"});
        assert_eq!(cell(&adapted), "3.4e-3 \\*");
        assert_eq!(cell(&json!({"error": "ValueError"})), "fails");
    }

    #[test]
    fn packages_are_pinned_to_one_version_each() {
        let text = std::fs::read_to_string(root().join("xtask/clients/requirements.txt")).unwrap();
        let packages = text.lines().filter(|line| !line.starts_with('#'));
        assert!(packages.clone().all(|line| line.contains("==")), "{text}");
        assert!(packages.clone().any(|line| line == "transformers==5.23.0"));
        assert!(packages.clone().any(|line| line == "gptqmodel==7.7.0"));
    }
}
