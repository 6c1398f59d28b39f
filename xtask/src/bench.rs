//! The speed table: complete runs of the `gptq` binary on one model, and the device operations.
//!
//! Seconds are from process start to exit, when files are synced. A layer's time is the median
//! interval between the progress lines of successive layers; the cold start is the time until the
//! end of the first layer, minus one layer's time. Device memory is polled from `nvidia-smi`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::root;

/// Branches of the published matrix: name, bits, group size.
const BRANCHES: [(&str, u32, i32); 6] = [
    ("main", 4, 128),
    ("gptq-4bit-32g-actorder_True", 4, 32),
    ("gptq-8bit--1g-actorder_True", 8, -1),
    ("gptq-8bit-128g-actorder_True", 8, 128),
    ("gptq-8bit-32g-actorder_True", 8, 32),
    ("gptq-4bit-64g-actorder_True", 4, 64),
];
/// Marks around the table in `kernels/BENCHMARKS.md`.
const BEGIN: &str = "<!-- xtask bench -->";
const END: &str = "<!-- end of xtask bench -->";
/// Polling interval for device memory.
const POLL: Duration = Duration::from_millis(200);

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// A model's directory, such as `cargo xtask synth` writes
    model: PathBuf,
    /// Directory for the branches, emptied after each run
    #[arg(long, default_value = "out/bench")]
    output: PathBuf,
    /// Text to calibrate on
    #[arg(long)]
    calibration: Option<PathBuf>,
    /// Number of calibration windows
    #[arg(long, default_value_t = 128)]
    samples: usize,
    /// Tokens per window
    #[arg(long, default_value_t = 4096)]
    seq_len: usize,
    /// Device to run on
    #[arg(long, default_value = "cuda")]
    device: String,
    /// The binary to measure, instead of this workspace's release build
    #[arg(long)]
    binary: Option<PathBuf>,
    /// The built `cuda_speed` example, instead of building it
    #[arg(long)]
    kernels: Option<PathBuf>,
    /// Only these rows: one, profile, six, dense, small, kernels
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Print JSON instead of markdown
    #[arg(long)]
    json: bool,
    /// Replace the table of whole runs in kernels/BENCHMARKS.md too
    #[arg(long)]
    write: bool,
}

/// A run to measure.
struct Case {
    key: &'static str,
    title: &'static str,
    branches: usize,
    dense: bool,
    flags: &'static [&'static str],
    /// Limit on device memory in bytes: a run that exceeds it by more than a tenth fails.
    budget: Option<u64>,
}

const CASES: [Case; 5] = [
    Case {
        key: "one",
        title: "one branch, 4-bit g128 act order",
        branches: 1,
        dense: false,
        flags: &[],
        budget: None,
    },
    Case {
        key: "profile",
        title: "the same with --profile",
        branches: 1,
        dense: false,
        flags: &["--profile"],
        budget: None,
    },
    Case {
        key: "six",
        title: "six branches",
        branches: 6,
        dense: false,
        flags: &[],
        budget: None,
    },
    Case {
        key: "dense",
        title: "six branches, propagate = \"dense\"",
        branches: 6,
        dense: true,
        flags: &[],
        budget: None,
    },
    Case {
        key: "small",
        title: "one branch, --device-memory 22GiB",
        branches: 1,
        dense: false,
        flags: &["--device-memory", "22GiB"],
        budget: Some(22 << 30),
    },
];

/// Results of a run.
struct Measured {
    seconds: f64,
    layer: Option<f64>,
    cold: Option<f64>,
    memory: Option<u64>,
    /// Output of `--profile`.
    profile: String,
}

pub(crate) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    let wanted = |key: &str| args.only.is_empty() || args.only.iter().any(|it| it == key);
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => build(&["--package", "gptq"], "release/gptq")?,
    };
    let mut rows = Vec::new();
    for case in CASES.iter().filter(|case| wanted(case.key)) {
        let measured = measure(args, &binary, case)?;
        rows.push((case, measured));
    }
    let kernels = match wanted("kernels") {
        true => kernels(args)?,
        false => String::new(),
    };
    if args.write {
        let path = root().join("kernels/BENCHMARKS.md");
        let text = std::fs::read_to_string(&path)?;
        let text = replaced(&text, &as_markdown(args, &rows, ""))
            .with_context(|| format!("{}: without {BEGIN} and {END}", path.display()))?;
        std::fs::write(&path, text)?;
    }
    match args.json {
        true => println!("{:#}", as_json(args, &rows, &kernels)),
        false => print!("{}", as_markdown(args, &rows, &kernels)),
    }
    Ok(())
}

/// Replaces what stands between the marks; `None` if one is missing.
fn replaced(document: &str, table: &str) -> Option<String> {
    let (before, rest) = document.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}\n{table}{END}{after}"))
}

/// Builds in release mode; returns the path of the result.
fn build(what: &[&str], built: &str) -> anyhow::Result<PathBuf> {
    let status = Command::new("cargo")
        .args(["build", "--release"])
        .args(what)
        .current_dir(root())
        .status()?;
    ensure!(status.success(), "cargo build {what:?} failed");
    let target = std::env::var_os("CARGO_TARGET_DIR");
    Ok(target
        .map_or_else(|| root().join("target"), PathBuf::from)
        .join(built))
}

fn kernels(args: &BenchArgs) -> anyhow::Result<String> {
    let binary = match &args.kernels {
        Some(binary) => binary.clone(),
        None => build(
            &["--package", "gptq-kernels", "--example", "cuda_speed"],
            "release/examples/cuda_speed",
        )?,
    };
    let output = Command::new(&binary).output();
    let output = output.with_context(|| binary.display().to_string())?;
    ensure!(output.status.success(), "{} failed", binary.display());
    Ok(String::from_utf8(output.stdout)?)
}

/// Formats a path as a TOML string.
pub(crate) fn quoted(path: &Path) -> toml::Value {
    toml::Value::String(path.display().to_string())
}

fn recipe(args: &BenchArgs, case: &Case) -> String {
    let calibration = args.calibration.clone().unwrap_or_else(|| {
        root().join("calibration/wikidoc/wikidoc_patient_information_1000.json")
    });
    let mut recipe = format!(
        "[model]\nsource = {}\n\n[calibration]\nsource = {}\ntemplate = \"{{input}}\\n{{output}}\"\n\
         samples = {}\nseq_len = {}\nsampling = \"random-windows\"\n\n[output]\ndir = {}\n\n\
         [defaults]\ndesc_act = true\nsym = true\ndamp_percent = 0.1\ntrue_sequential = true\n",
        quoted(&args.model),
        quoted(&calibration),
        args.samples,
        args.seq_len,
        quoted(&args.output)
    );
    if case.dense {
        recipe.insert_str(0, "propagate = \"dense\"\n\n");
    }
    for (name, bits, group) in &BRANCHES[..case.branches] {
        write!(
            recipe,
            "\n[[branch]]\nname = {name:?}\nbits = {bits}\ngroup_size = {group}\n"
        )
        .expect("writing to a string cannot fail");
    }
    recipe
}

fn measure(args: &BenchArgs, binary: &Path, case: &Case) -> anyhow::Result<Measured> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("bench.toml");
    std::fs::write(&path, recipe(args, case))?;
    let started = Instant::now();
    let mut child = Command::new(binary)
        .arg("quantize")
        .arg(&path)
        .args(["--device", &args.device])
        .args(case.flags)
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| binary.display().to_string())?;
    let output = BufReader::new(child.stdout.take().expect("stdout is piped"));
    let (ended, peak) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut layers: BTreeMap<usize, f64> = BTreeMap::new();
    let mut profile = String::new();
    scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                peak.fetch_max(used_memory().unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(POLL);
            }
        });
        for line in output.lines().map_while(Result::ok) {
            if let Some(layer) = layer_of(&line) {
                layers.insert(layer, started.elapsed().as_secs_f64());
            }
            if !profile.is_empty() || line.starts_with("phase ") {
                profile += &line;
                profile.push('\n');
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
    let status = child.wait()?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(status.success(), "{}: {status}", case.title);
    std::fs::remove_dir_all(&args.output).with_context(|| args.output.display().to_string())?;
    let (peak, budget) = (peak.into_inner(), case.budget.unwrap_or(u64::MAX));
    ensure!(
        peak <= budget.saturating_add(budget / 10),
        "{}: {peak} bytes in use, of {budget} allowed",
        case.title
    );
    let ends: Vec<f64> = layers.into_values().collect();
    let mut steps: Vec<f64> = ends.windows(2).map(|pair| pair[1] - pair[0]).collect();
    steps.sort_by(f64::total_cmp);
    let layer = steps.get(steps.len() / 2).copied();
    Ok(Measured {
        seconds,
        layer,
        cold: layer.and_then(|layer| Some(ends.first()? - layer)),
        memory: Some(peak).filter(|&peak| peak > 0),
        profile,
    })
}

/// Parses `k` from a progress line `NAME: layer k/n, ...`.
fn layer_of(line: &str) -> Option<usize> {
    let (_, rest) = line.split_once(": layer ")?;
    rest.split_once('/')?.0.parse().ok()
}

/// Returns the bytes in use on the first device.
fn used_memory() -> Option<u64> {
    let output = Command::new("nvidia-smi")
        .args(["--query-gpu=memory.used", "--format=csv,noheader,nounits"])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let mebibytes: u64 = text.lines().next()?.trim().parse().ok()?;
    Some(mebibytes << 20)
}

/// Returns the name of the device and its driver.
fn card() -> String {
    Command::new("nvidia-smi")
        .args(["--query-gpu=name,driver_version", "--format=csv,noheader"])
        .output()
        .ok()
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .and_then(|text| Some(text.lines().next()?.replace(',', ", driver")))
        .unwrap_or_else(|| "no NVIDIA device".to_owned())
}

fn as_markdown(args: &BenchArgs, rows: &[(&Case, Measured)], kernels: &str) -> String {
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.2}"));
    let mut text = format!(
        "{}; {}; {} windows of {} tokens; device {}\n\n\
         | run | seconds | per layer | cold start | peak device memory |\n|---|---|---|---|---|\n",
        card(),
        chrono::Utc::now().format("%Y-%m-%d"),
        args.samples,
        args.seq_len,
        args.device
    );
    for (case, measured) in rows {
        let memory = measured
            .memory
            .map(|bytes| bytes as f64 / f64::from(1 << 30));
        text += &format!(
            "| {} | {:.2} | {} | {} | {} |\n",
            case.title,
            measured.seconds,
            number(measured.layer),
            number(measured.cold),
            memory.map_or("-".to_owned(), |v| format!("{v:.1} GiB"))
        );
    }
    for (_, measured) in rows.iter().filter(|(_, it)| !it.profile.is_empty()) {
        text += &format!("\n```text\n{}```\n", measured.profile);
    }
    if !kernels.is_empty() {
        text += &format!("\n{kernels}");
    }
    text
}

fn as_json(args: &BenchArgs, rows: &[(&Case, Measured)], kernels: &str) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|(case, measured)| {
            json!({
                "run": case.key,
                "seconds": measured.seconds,
                "seconds_per_layer": measured.layer,
                "cold_start_seconds": measured.cold,
                "peak_device_bytes": measured.memory,
                "profile": measured.profile,
            })
        })
        .collect();
    json!({
        "card": card(),
        "samples": args.samples,
        "seq_len": args.seq_len,
        "device": args.device,
        "runs": rows,
        "kernels": kernels.lines().collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_table_takes_the_place_of_the_old_one() {
        let text = std::fs::read_to_string(root().join("kernels/BENCHMARKS.md")).unwrap();
        let new = replaced(&text, "| a |\n").unwrap();
        assert!(new.contains(&format!("{BEGIN}\n| a |\n{END}\n")), "{new}");
        assert_eq!(replaced(&new, "| a |\n").unwrap(), new);
        assert!(new.len() < text.len());
    }

    #[test]
    fn progress_lines_name_their_layer() {
        assert_eq!(layer_of("main: layer 12/32, mean error 1.2e-3"), Some(12));
        assert_eq!(layer_of("main: written, 3.90 GB"), None);
    }
}
