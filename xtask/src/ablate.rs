//! The accuracy table: every option alone and combined, at every setting, on a small model.
//!
//! A row is one run of the `gptq` binary with a branch per setting. Perplexity is measured on two
//! texts: options are chosen by the first, and the second checks that they generalize. The table of
//! other tools, measured separately with the same windows, is printed beside it.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::root;

/// Bits, group size and act order of each column.
const SETTINGS: [(&str, u32, u32, bool); 6] = [
    ("4-bit g128", 4, 128, true),
    ("4-bit g32", 4, 32, true),
    ("3-bit g128", 3, 128, true),
    ("2-bit g64", 2, 64, true),
    ("8-bit g128", 8, 128, true),
    ("4-bit g128, no act order", 4, 128, false),
];

/// Defaults of the recipe for each row.
const OPTIONS: [(&str, &str); 10] = [
    ("plain GPTQ", "preset = \"autogptq\""),
    ("refined once", "preset = \"autogptq\"\nrefine = 1"),
    (
        "asymmetric",
        "preset = \"autogptq\"\nmismatch_correction = 1.0",
    ),
    ("searched", "preset = \"standard\""),
    ("searched, refined once", "refine = 1"),
    ("searched, refined three times", "refine = 3"),
    ("searched, asymmetric by half", "mismatch_correction = 0.5"),
    ("searched, asymmetric", "mismatch_correction = 1.0"),
    (
        "searched, asymmetric, refined once",
        "mismatch_correction = 1.0\nrefine = 1",
    ),
    (
        "searched, asymmetric, refined three times",
        "mismatch_correction = 1.0\nrefine = 3",
    ),
];

/// Settings that a size budget is compared with, and their bits per weight as stored.
const SIZES: [(&str, u32, u32, f64); 5] = [
    ("2-bit g64", 2, 64, 2.342),
    ("2-bit g32", 2, 32, 2.638),
    ("3-bit g64", 3, 64, 3.342),
    ("3-bit g32", 3, 32, 3.638),
    ("4-bit g128", 4, 128, 4.201),
];

/// Perplexity of other tools at the first five settings on medi-24m with the same 128 windows, on
/// the first text (400 WikiDoc texts): measured with their releases of 2026.
const PEERS: [(&str, [Option<f64>; 5]); 6] = [
    (
        "round to nearest",
        [
            Some(18.943),
            Some(18.729),
            Some(21.947),
            Some(69.31),
            Some(18.345),
        ],
    ),
    (
        "GPTQModel 7.6.0",
        [
            Some(18.677),
            Some(18.556),
            Some(20.313),
            Some(38.77),
            Some(18.346),
        ],
    ),
    (
        "llm-compressor 0.14, static act order",
        [
            Some(18.661),
            Some(18.573),
            Some(20.288),
            Some(37.67),
            Some(18.345),
        ],
    ),
    (
        "GPTQModel with gptaq",
        [Some(18.708), Some(18.518), Some(20.170), Some(35.09), None],
    ),
    (
        "GPTQModel with mse 2.4",
        [Some(18.615), Some(18.488), Some(19.616), None, None],
    ),
    (
        "AutoRound 0.15.1, 200 iterations (backpropagation)",
        [Some(18.506), Some(18.397), Some(18.970), Some(21.26), None],
    ),
];

#[derive(Args)]
pub(crate) struct AblateArgs {
    /// The model's directory
    model: PathBuf,
    /// Calibration text: rows of {input, output}, of which the first 1000 are used
    #[arg(long)]
    calibration: PathBuf,
    /// Text by which options are chosen
    #[arg(long)]
    text: PathBuf,
    /// Text by which nothing is chosen
    #[arg(long)]
    second: PathBuf,
    /// Description of the second text, for the document
    #[arg(long)]
    second_name: String,
    /// Device to run on
    #[arg(long, default_value = "auto")]
    device: String,
    /// Description of the machine, for the document
    #[arg(long)]
    machine: String,
    /// The binary to measure, instead of this workspace's release build
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Directory for branches, emptied after each row
    #[arg(long, default_value = "out/ablate")]
    work: PathBuf,
    /// Directory for ACCURACY.md and ACCURACY.json, instead of crates/gptq-solver
    #[arg(long)]
    output: Option<PathBuf>,
}

/// A table's title, and the value that it shows for a branch.
type Table = (String, fn(&Cell) -> String);

/// A row's name and its branches.
type Row = (String, Vec<Cell>);

/// Results of one branch.
struct Cell {
    first: f64,
    second: f64,
    error: f64,
    seconds: f64,
}

pub(crate) fn run(args: &AblateArgs) -> anyhow::Result<()> {
    let settings = SETTINGS.map(|(_, bits, group, act_order)| {
        format!("bits = {bits}\ngroup_size = {group}\ndesc_act = {act_order}")
    });
    let uniform = SIZES.map(|(_, bits, group, _)| format!("bits = {bits}\ngroup_size = {group}"));
    let budgets = SIZES.map(|(.., budget)| format!("budget_bits = {budget}"));
    let measure = |name: &str, options: &str, branches: &[String]| -> anyhow::Result<Row> {
        let cells = row(args, options, branches).with_context(|| format!("row {name:?}"))?;
        let shown: Vec<String> = cells.iter().map(|c| format!("{:.3}", c.first)).collect();
        eprintln!("{name}: {}", shown.join(", "));
        Ok((name.to_owned(), cells))
    };
    let rows = OPTIONS.map(|(name, options)| measure(name, options, &settings));
    let rows = rows.into_iter().collect::<anyhow::Result<Vec<Row>>>()?;
    let mut sizes = Vec::new();
    for preset in ["standard", "best"] {
        let options = format!("preset = \"{preset}\"");
        for (how, branches) in [("one setting", &uniform), ("a budget", &budgets)] {
            sizes.push(measure(&format!("{preset}, {how}"), &options, branches)?);
        }
    }
    let dense = dense(args)?;
    let output = args
        .output
        .clone()
        .unwrap_or_else(|| root().join("crates/gptq-solver"));
    std::fs::create_dir_all(&output)?;
    std::fs::write(
        output.join("ACCURACY.md"),
        document(args, &rows, &sizes, dense),
    )?;
    let json = |rows: &[Row], settings: &[&str]| -> Vec<Value> {
        let rows = rows.iter();
        rows.flat_map(|row| json_rows(row, settings)).collect()
    };
    let all = json!({
        "dense": { "first": dense[0], "second": dense[1] },
        "rows": json(&rows, &SETTINGS.map(|it| it.0)),
        "sizes": json(&sizes, &SIZES.map(|it| it.0)),
    });
    std::fs::write(
        output.join("ACCURACY.json"),
        format!("{}\n", serde_json::to_string_pretty(&all)?),
    )?;
    Ok(())
}

/// Makes `gptq COMMAND INPUT` on the requested device.
fn gptq(args: &AblateArgs, command: &str, input: &Path) -> Command {
    let built = root().join("target/release/gptq");
    let mut gptq = Command::new(args.binary.as_ref().unwrap_or(&built));
    gptq.arg(command)
        .arg(input)
        .args(["--device", &args.device]);
    gptq
}

/// Runs `options` as defaults with a branch for each of `settings`.
fn row(args: &AblateArgs, options: &str, settings: &[String]) -> anyhow::Result<Vec<Cell>> {
    if args.work.exists() {
        std::fs::remove_dir_all(&args.work)?;
    }
    std::fs::create_dir_all(&args.work)?;
    let recipe = args.work.join("recipe.toml");
    let branches = args.work.join("branches");
    std::fs::write(&recipe, recipe_text(args, options, settings, &branches)?)?;
    output(
        gptq(args, "quantize", &recipe)
            .arg("--perplexity")
            .arg(&args.text),
    )?;
    let mut cells = Vec::new();
    for at in 0..settings.len() {
        let dir = branches.join(format!("b{at}"));
        let report: Value = serde_json::from_slice(&std::fs::read(dir.join("report.json"))?)?;
        let linears = report["linears"]
            .as_array()
            .context("a report without linear layers")?;
        let errors = linears
            .iter()
            .filter_map(|it| it["relative_error"].as_f64());
        cells.push(Cell {
            first: number(&report["perplexity"]["value"])?,
            second: perplexity(args, &dir, &args.second)?,
            error: errors.sum::<f64>() / linears.len() as f64,
            seconds: number(&report["seconds"])?,
        });
    }
    std::fs::remove_dir_all(&args.work)?;
    Ok(cells)
}

fn recipe_text(
    args: &AblateArgs,
    options: &str,
    settings: &[String],
    branches: &Path,
) -> anyhow::Result<String> {
    let path = |path: &Path| -> anyhow::Result<String> {
        let path = std::path::absolute(path)?;
        Ok(toml_string(&path.to_string_lossy()))
    };
    let mut text = format!(
        "[model]\nsource = {}\n\n[calibration]\nsource = {}\ntemplate = \"{{input}}\\n{{output}}\"\n\
         rows = \"0:1000\"\nsamples = 128\nseq_len = 1024\nsampling = \"concatenate\"\n\n\
         [output]\ndir = {}\n\n[defaults]\nsym = true\ndamp_percent = 0.1\n{options}\n",
        path(&args.model)?,
        path(&args.calibration)?,
        path(branches)?,
    );
    for (at, lines) in settings.iter().enumerate() {
        write!(text, "\n[[branch]]\nname = \"b{at}\"\n{lines}\n")?;
    }
    Ok(text)
}

fn toml_string(value: &str) -> String {
    format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Measures the perplexity of the dense model on both texts.
fn dense(args: &AblateArgs) -> anyhow::Result<[f64; 2]> {
    Ok([
        perplexity(args, &args.model, &args.text)?,
        perplexity(args, &args.model, &args.second)?,
    ])
}

fn perplexity(args: &AblateArgs, dir: &Path, text: &Path) -> anyhow::Result<f64> {
    let mut verify = gptq(args, "verify", dir);
    verify
        .arg("--text")
        .arg(text)
        .args(["--json", "--no-receipt"]);
    let receipt: Value = serde_json::from_slice(&output(&mut verify)?)?;
    number(&receipt["perplexity"]["value"])
}

fn output(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let done = command
        .output()
        .with_context(|| format!("starting {command:?}"))?;
    ensure!(
        done.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    Ok(done.stdout)
}

fn number(value: &Value) -> anyhow::Result<f64> {
    value
        .as_f64()
        .with_context(|| format!("{value} is not a number"))
}

fn json_rows((name, cells): &Row, settings: &[&str]) -> Vec<Value> {
    let settings = settings.iter().zip(cells);
    settings
        .map(|(setting, cell)| {
            json!({
                "options": name,
                "setting": setting,
                "perplexity": cell.first,
                "perplexity_second": cell.second,
                "mean_relative_error": cell.error,
                "seconds": cell.seconds,
            })
        })
        .collect()
}

fn document(args: &AblateArgs, rows: &[Row], sizes: &[Row], [first, second]: [f64; 2]) -> String {
    let mut text = format!(
        "# Accuracy, option by option\n\n\
         Written by `cargo xtask ablate`, with the figures of other tools as reported by those tools. medi-24m (23.5 million parameters, trained on \
         WikiDoc), calibrated on the first 128 windows of 1024 tokens of WikiDoc's first 1000 rows, symmetric, \
         damping 0.1. {}.\n\n\
         - **searched**: each group's scale is the best of 32 ranges, mirrored towards the largest weight if positive, weighted by the cost of \
         an error in a column for the sweep (`src/grid.rs`).\n\
         - **asymmetric**: activation-mismatch correction: the rounded weight is the one that reproduces the dense model's output from the \
         quantized model's inputs, measured on a quarter of the windows (`src/target.rs`).\n\
         - **refined**: passes of coordinate descent over the codes after the sweep (`src/refine.rs`).\n\n\
         `preset = \"autogptq\"` is plain GPTQ, `\"standard\"` (the default) is searched, and `\"best\"` is searched \
         and asymmetric, and refined once at 2 and 3 bits.\n",
        args.machine
    );
    let tables: [Table; 4] = [
        (
            format!(
                "Perplexity on 400 WikiDoc texts (fp16 {first:.3}), by which options are chosen; equivalent \
                 runs are within 0.1 % of each other, within 1 % at 2 bits"
            ),
            |cell| format!("{:.3}", cell.first),
        ),
        (
            format!(
                "Perplexity on {} (fp16 {second:.3}), by which nothing is chosen",
                args.second_name
            ),
            |cell| format!("{:.3}", cell.second),
        ),
        (
            "Mean relative error of the linear layers' outputs, against the original weights"
                .to_owned(),
            |cell| format!("{:.3e}", cell.error),
        ),
        (
            "Seconds of each branch, six in one run".to_owned(),
            |cell| format!("{:.2}", cell.seconds),
        ),
    ];
    for (at, (title, show)) in tables.iter().enumerate() {
        text += &table(title, &SETTINGS.map(|it| it.0), rows, *show);
        if at == 0 {
            for (name, figures) in PEERS {
                let shown = figures.map(|it| it.map_or(String::new(), |it| format!("{it:.3}")));
                let _ = writeln!(text, "| *{name}* | {} | |", shown.join(" | "));
            }
        }
    }
    text += "\nA size budget (`budget_bits`) gives each linear layer its own bits and group size; here it \
             equals the bits per weight of the setting above the column, scales, zero points and `g_idx` included.\n";
    for (title, show) in &tables[..2] {
        let title = title.replacen(
            "Perplexity",
            "The same size with and without a budget: perplexity",
            1,
        );
        text += &table(&title, &SIZES.map(|it| it.0), sizes, *show);
    }
    text
}

/// Formats one value of each branch: `rows` by `headings`.
fn table(title: &str, headings: &[&str], rows: &[Row], show: fn(&Cell) -> String) -> String {
    let mut text = format!("\n## {title}\n\n| options | {} |\n", headings.join(" | "));
    let _ = writeln!(text, "|{}", "---|".repeat(headings.len() + 1));
    for (name, cells) in rows {
        let shown: Vec<String> = cells.iter().map(show).collect();
        let _ = writeln!(text, "| {name} | {} |", shown.join(" | "));
    }
    text
}
