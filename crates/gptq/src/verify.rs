//! `gptq verify`: one branch, or every branch below a directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use clap::Args;
use gptq_calibration::{EvaluationText, TextTokenizer};
use gptq_format::branch_dirs;
use gptq_kernels::Device;
use gptq_plan::{Check, Depth, RECEIPT, Receipt};
use gptq_verify::{Asked, Evaluation, VerifyOptions, check_gguf, verify};

use crate::text_progress::TextProgress;
use crate::{log, table, terminal};

#[derive(Args)]
pub(crate) struct VerifyArgs {
    /// A branch directory, a directory of branches, a GGUF file, or a dense checkpoint
    dir: PathBuf,
    /// Evaluate on this file: plain text, a JSON list of texts, or rows with a column text (.json,
    /// .jsonl, .csv, .parquet, .arrow), also as .gz or .zst; not the calibration data
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens per window
    #[arg(long, value_name = "N", default_value_t = 1024)]
    window: usize,
    /// Run this dense model on the text too, and compare blocks and predictions
    #[arg(long, value_name = "MODEL", requires = "text")]
    against: Option<PathBuf>,
    /// Check that the weights are to the bit those of this branch, which DIR was exported from
    #[arg(long, value_name = "BRANCH")]
    branch: Option<PathBuf>,
    /// Tolerated perplexity increase over the dense model, as a fraction [default of this and the
    /// following: from the loss of round-to-nearest with the branch's settings on the same text]
    #[arg(long, value_name = "X")]
    max_perplexity_increase: Option<f64>,
    /// Tolerated mean KL divergence from the dense model's predictions, in nats
    #[arg(long, value_name = "X")]
    max_kl: Option<f64>,
    /// Minimum fraction of tokens where both models have the same most likely next token
    #[arg(long, value_name = "X")]
    min_top1: Option<f64>,
    /// Tolerated relative error of a block's output, given the dense block's input
    #[arg(long, value_name = "X")]
    max_block_error: Option<f64>,
    /// Do not write verify.json into the branch directory
    #[arg(long)]
    no_receipt: bool,
    /// auto, cpu, cuda or cuda:N
    #[arg(short, long, default_value = "auto")]
    device: Device,
    /// Print the verification report as JSON; for several branches, one object with a report each
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: VerifyArgs) -> Result<()> {
    if args.dir.extension().is_some_and(|end| end == "gguf") {
        return gguf(&args);
    }
    let request = VerifyOptions {
        evaluation: args.text.clone().map(|text| Evaluation {
            text,
            window: args.window,
        }),
        against: args.against.clone(),
        branch: args.branch.clone(),
        tolerances: Asked {
            perplexity_increase: args.max_perplexity_increase,
            kl_divergence: args.max_kl,
            top1_agreement: args.min_top1,
            block_error: args.max_block_error,
        },
    };
    let single = args.dir.join("config.json").exists();
    let branches = match single {
        true => vec![(args.dir.display().to_string(), args.dir.clone())],
        false => branches(&args.dir)?,
    };
    let mut receipts = Vec::new();
    if let (Some(text), Some((_, first))) = (&args.text, branches.first()) {
        text_warnings(text, args.window, first)?
            .iter()
            .for_each(|line| log::warning(line));
    }
    for (name, dir) in branches {
        let receipt = judge(&name, &dir, &request, args.device)?;
        if !args.json {
            show(&name, &receipt);
        }
        if !args.no_receipt && dir_is_quantized(&receipt) {
            keep(&receipt, &name, &dir)?;
        }
        receipts.push((name, receipt));
    }
    if args.json {
        let text = match single {
            true => serde_json::to_string_pretty(&receipts[0].1)?,
            false => {
                let all: BTreeMap<_, _> = receipts.iter().map(|(n, r)| (n, r)).collect();
                serde_json::to_string_pretty(&all)?
            }
        };
        println!("{text}");
    } else if !single {
        println!("\n{}", summary(&receipts).trim_end());
    }
    let failed = receipts.iter().filter(|(_, receipt)| !receipt.pass);
    let failed: Vec<String> = failed
        .map(|(name, receipt)| {
            let failures = receipt.failures().into_iter().chain(receipt.advice.clone());
            format!("{name}: {}", failures.collect::<Vec<_>>().join("; "))
        })
        .collect();
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    Ok(())
}

/// Verifies a GGUF file: its header, and its weights against a branch.
fn gguf(args: &VerifyArgs) -> Result<()> {
    ensure!(
        args.text.is_none(),
        "{}: gptq does not run GGUF files; verify the branch it was exported from on the text, and this file with --branch",
        args.dir.display()
    );
    let checks = check_gguf(&args.dir, args.branch.as_deref())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&checks)?);
    } else {
        println!("{}", args.dir.display());
        show_checks(&checks);
    }
    match checks.iter().find(|check| !check.pass) {
        Some(failed) => bail!("{}: {}: {}", args.dir.display(), failed.name, failed.detail),
        None => Ok(()),
    }
}

/// Warns about the text before it is evaluated. All branches of a matrix have the same tokenizer.
fn text_warnings(text: &Path, window: usize, dir: &Path) -> Result<Vec<String>> {
    // Missing or damaged files are reported by the verification.
    let Ok(tokenizer) = TextTokenizer::load(dir) else {
        return Ok(Vec::new());
    };
    let text = EvaluationText::first_look(text, &tokenizer, window)?;
    Ok(tokenizer
        .end_warning()
        .into_iter()
        .chain(text.warnings())
        .collect())
}

/// Returns the checkpoints directly below `dir`, by name, `main` first.
pub(crate) fn branches(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut found = match dir.is_dir() {
        true => branch_dirs(dir)?,
        false => Vec::new(),
    };
    found.retain(|(_, path)| path.join("config.json").exists());
    ensure!(
        !found.is_empty(),
        "{}: neither a checkpoint nor a directory of them; it has no config.json, nor has anything \
         directly below it",
        dir.display()
    );
    Ok(found)
}

fn judge(name: &str, dir: &Path, request: &VerifyOptions, device: Device) -> Result<Receipt> {
    let mut progress = TextProgress::new(name);
    Ok(verify(dir, request, device, &mut |done| {
        progress.show(done)
    })?)
}

/// Writes the verification report, or keeps a deeper one of the same files.
fn keep(receipt: &Receipt, name: &str, dir: &Path) -> Result<()> {
    // A report that cannot be read is ignored.
    let before = Receipt::read(dir).ok().flatten();
    let (standing, stays) = receipt.standing(before);
    standing.write(dir)?;
    if stays && !standing.pass {
        log::warning(&format!(
            "{name}: these files failed a deeper verification, and {RECEIPT} keeps that result ({}); \
             {} verifies them again",
            standing.failures().join("; "),
            again(&standing, dir)
        ));
    }
    Ok(())
}

/// Returns the command for a verification as deep as `receipt`.
pub(crate) fn again(receipt: &Receipt, dir: &Path) -> String {
    let text = match &receipt.perplexity {
        Some(measured) => format!("{} --window {}", measured.text, measured.window),
        None => "FILE".to_owned(),
    };
    let more = match receipt.depth() {
        Depth::Files => String::new(),
        Depth::Text => format!(" --text {text}"),
        Depth::Beside => format!(" --text {text} --against MODEL"),
    };
    format!("gptq verify {}{more}", dir.display())
}

/// Returns true for quantized weights: no report is written into a directory of dense weights.
fn dir_is_quantized(receipt: &Receipt) -> bool {
    receipt.files.contains_key("quantize_config.json")
        || receipt.checks.iter().any(|check| check.name == "clients")
}

fn show(name: &str, receipt: &Receipt) {
    println!("{name}: {}", if receipt.pass { "passed" } else { "FAILED" });
    show_checks(&receipt.checks);
    if let Some(p) = receipt.perplexity.as_ref().filter(|p| p.dense.is_none()) {
        println!("  perplexity {:.4}", p.value);
    }
    if let Some(p) = &receipt.perplexity {
        let text = terminal::line(&p.text);
        println!(
            "  measured on {} tokens of {text} in windows of {}{}",
            p.tokens,
            p.window,
            match p.left_over {
                0 => String::new(),
                more => format!("; {more} more do not fill a window"),
            }
        );
    }
    if let Some(advice) = &receipt.advice {
        println!("  {}", terminal::line(advice));
    }
}

/// Prints one line for each check.
fn show_checks(checks: &[Check]) {
    let rows = checks.iter().map(|check| {
        let mark = if check.pass { "ok" } else { "FAILED" };
        (mark, &check.name, terminal::line(&check.detail))
    });
    let width = checks.iter().map(|c| c.name.len()).max().unwrap_or(0);
    for (mark, name, detail) in rows {
        println!("  {mark:<6}  {name:<width$}  {detail}");
    }
}

/// Formats one row per branch.
fn summary(receipts: &[(String, Receipt)]) -> String {
    let heading = [
        "branch",
        "checks",
        "perplexity",
        "over dense",
        "KL",
        "top-1",
        "worst block",
    ];
    let mut rows = vec![heading.map(String::from).to_vec()];
    for (name, receipt) in receipts {
        let number = |value: Option<f64>, digits: usize| {
            value.map_or_else(|| "-".to_owned(), |v| format!("{v:.digits$}"))
        };
        let perplexity = receipt.perplexity.as_ref();
        let increase = perplexity.and_then(|p| Some(100.0 * (p.value / p.dense? - 1.0)));
        let worst = receipt.blocks.iter().filter_map(|b| b.relative_error);
        let passed = receipt.checks.iter().filter(|c| c.pass).count();
        rows.push(vec![
            name.clone(),
            format!("{passed}/{}", receipt.checks.len()),
            number(perplexity.map(|p| p.value), 3),
            increase.map_or_else(|| "-".to_owned(), |i| format!("{i:+.2} %")),
            number(receipt.kl_divergence, 5),
            number(receipt.top1_agreement, 4),
            number(worst.max_by(f64::total_cmp), 5),
        ]);
    }
    table::render(&rows)
}
