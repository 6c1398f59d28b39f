//! The accuracy tables: options of the method on two models, with other tools beside them.
//!
//! A row is one run of the `gptq` binary with a branch per setting. Perplexity and KL divergence from the dense model
//! are measured on two texts: options are chosen by the first, and the second checks that they generalize. Each row is
//! added to `ACCURACY.json` when it is measured, so the tables can be completed in several runs; `ACCURACY.md` is made
//! from that file alone.

mod document;
mod measure;
mod models;
mod peers;
mod results;
mod rows;
mod table;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;

use crate::root;
use measure::Measurement;
use models::{MEDI, Model, SMOLLM2};
use results::{Results, RowResults, Text};
use rows::Row;

#[derive(Args)]
pub(crate) struct AblateArgs {
    /// The directory of medi-24m
    #[arg(long, value_name = "DIR")]
    medi: Option<PathBuf>,
    /// The directory of SmolLM2-135M
    #[arg(long, value_name = "DIR")]
    smollm2: Option<PathBuf>,
    /// Calibration text: rows of {input, output}, of which the first 1000 are used
    #[arg(long, value_name = "FILE", required_unless_present = "document_only")]
    calibration: Option<PathBuf>,
    /// Text by which options are chosen
    #[arg(long, value_name = "FILE", required_unless_present = "document_only")]
    text: Option<PathBuf>,
    /// Text by which nothing is chosen
    #[arg(long, value_name = "FILE", required_unless_present = "document_only")]
    second: Option<PathBuf>,
    /// Description of the second text, for the document
    #[arg(long, value_name = "TEXT", required_unless_present = "document_only")]
    second_name: Option<String>,
    /// Description of the machine, for the document
    #[arg(long, value_name = "TEXT", required_unless_present = "document_only")]
    machine: Option<String>,
    /// Only these rows, separated by commas
    #[arg(long, value_name = "ROWS", value_delimiter = ',')]
    rows: Vec<String>,
    /// Skip rows that ACCURACY.json has
    #[arg(long)]
    missing: bool,
    /// Measure nothing: make ACCURACY.md from ACCURACY.json
    #[arg(long)]
    document_only: bool,
    /// Device to run on
    #[arg(long, default_value = "auto")]
    device: String,
    /// The binary to measure, instead of this workspace's release build
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
    /// Directory for a row's branches, which are removed after the row
    #[arg(long, value_name = "DIR", default_value = "out/ablate")]
    work: PathBuf,
    /// Directory for ACCURACY.md and ACCURACY.json, instead of crates/gptq-solver
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

pub(crate) fn run(args: &AblateArgs) -> anyhow::Result<()> {
    let output = match &args.output {
        Some(output) => output.clone(),
        None => root().join("crates/gptq-solver"),
    };
    std::fs::create_dir_all(&output)?;
    let mut results = Results::read(&output)?;
    if args.document_only {
        return write_document(&results, &output);
    }
    let models = [(&MEDI, &args.medi), (&SMOLLM2, &args.smollm2)];
    let models = models.map(|(model, dir)| Some((model, dir.as_deref()?)));
    let models: Vec<(&Model, &Path)> = models.into_iter().flatten().collect();
    ensure!(
        !models.is_empty(),
        "no model: give --medi, --smollm2 or both"
    );
    let rows = rows::chosen(&args.rows)?;
    let mut measurement = measurement(args)?;
    results.second_name = args.second_name.clone().context("no --second-name")?;
    let mut failed = Vec::new();
    for (model, dir) in models {
        for row in &rows {
            let known = args.missing && results.row(model, row.key).is_some();
            if known || row.settings(model).is_empty() {
                continue;
            }
            // The rows after one that fails are measured nevertheless.
            match measurement.row(model, dir, row) {
                Ok((measured, texts)) => {
                    show(model, row, &measured, &texts);
                    results.add(model, row.key, measured, texts)?;
                    results.write(&output)?;
                    write_document(&results, &output)?;
                }
                Err(error) => {
                    eprintln!("{}, {}: {error:#}", model.name, row.key);
                    failed.push(format!("{}, {}", model.name, row.key));
                }
            }
        }
    }
    ensure!(failed.is_empty(), "not measured: {}", failed.join("; "));
    Ok(())
}

fn measurement(args: &AblateArgs) -> anyhow::Result<Measurement<'_>> {
    Ok(Measurement {
        binary: match &args.binary {
            Some(binary) => std::path::absolute(binary)?,
            None => root().join("target/release/gptq"),
        },
        device: &args.device,
        machine: args.machine.as_deref().context("no --machine")?,
        work: &args.work,
        calibration: args.calibration.as_deref().context("no --calibration")?,
        texts: [
            args.text.as_deref().context("no --text")?,
            args.second.as_deref().context("no --second")?,
        ],
        warned: BTreeSet::new(),
    })
}

fn write_document(results: &Results, output: &Path) -> anyhow::Result<()> {
    let path = output.join("ACCURACY.md");
    Ok(std::fs::write(path, document::document(results))?)
}

/// Prints a row's perplexity on the first text, and warns if the peers' was measured on other tokens.
fn show(model: &Model, row: &Row, measured: &RowResults, texts: &[Text; 2]) {
    let shown = row.settings(model).iter().map(|setting| {
        let first = measured.branches[setting.name].texts[0];
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |it| format!("{it:.4}"));
        let (perplexity, kl) = (number(first.perplexity), number(first.kl_divergence));
        format!("{} {perplexity} (KL {kl})", setting.name)
    });
    let shown: Vec<String> = shown.collect();
    eprintln!("{}, {}: {}", model.name, row.key, shown.join(", "));
    let (dense, peers) = (texts[0].dense, model.peers.dense);
    if (dense / peers - 1.0).abs() > 1e-3 {
        eprintln!(
            "{}: the dense model's perplexity on {} is {dense:.3}, and {peers:.3} in the peers' measurement",
            model.name, texts[0].file
        );
    }
}
