//! The numbers of a matrix, one row per branch: for the page, as CSV and as JSON.

use gptq_format::{Bits, GroupSize};
use gptq_plan::{Measure, Preset, csv_text};
use serde::Serialize;

use crate::{Accuracy, Branch, Matrix, Measured, Windows};

/// One branch. Fields without a measurement are `null` in JSON and empty in CSV.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct BranchRow {
    /// Its name.
    pub branch: String,
    /// Code width of the linear layers without an override.
    pub bits: Bits,
    /// Columns per group of the linear layers without an override; -1 for one group per row.
    pub group_size: GroupSize,
    /// True if some linear layers have other bits or another group size.
    pub mixed: bool,
    /// Bits per weight of the quantized linear layers, scales, zero points and `g_idx` included.
    pub bits_per_weight: Option<f64>,
    /// Act order as declared to clients (`desc_act`).
    pub desc_act: bool,
    /// Solving order: "yes", "no", or "static" with groups in the original column order.
    pub act_order: &'static str,
    /// True for symmetric codes.
    pub sym: bool,
    /// Requested damping, as a fraction of the mean diagonal.
    pub damp_percent: f64,
    /// Preset of the method.
    pub preset: Preset,
    /// Bytes of the weight files.
    pub bytes: u64,
    /// Mean output error of the linear layers against the dense model; absent in older reports.
    pub mean_output_error: Option<f64>,
    /// Largest output error of a linear layer.
    pub worst_output_error: Option<f64>,
    /// Mean of the linear layers' output errors as a fraction of round-to-nearest's.
    pub mean_output_ratio: Option<f64>,
    /// Error of the last block's output against the dense model's: the accumulated error of all
    /// blocks.
    pub last_block_error: Option<f64>,
    /// Mean over the linear layers of the solver's objective.
    pub mean_objective: Option<f64>,
    /// Mean error of the linear layers against the original weights, on the branch's own inputs.
    pub mean_error: f64,
    /// Largest of these errors.
    pub worst_error: f64,
    /// Mean of these errors as a fraction of round-to-nearest's.
    pub mean_ratio: f64,
    /// Perplexity on held-out text: in all rows on the same windows, those that most branches
    /// share.
    pub perplexity: Option<f64>,
    /// File name of the text.
    pub text: Option<String>,
    /// Tokens per window.
    pub window: Option<usize>,
    /// Perplexity of the dense model on the same windows.
    pub dense_perplexity: Option<f64>,
    /// Mean KL divergence from the dense model, nats.
    pub kl_divergence: Option<f64>,
    /// Share of positions with the dense model's most likely token.
    pub top1_agreement: Option<f64>,
    /// Measurements on other windows, which are not comparable with those above.
    pub on_other_windows: Vec<Measured>,
    /// Accuracies on tasks, by `gptq eval` or read from the harness.
    pub accuracies: Vec<Accuracy>,
    /// Result of `gptq verify`.
    pub verified: Option<bool>,
    /// Wall time spent on this branch alone, in seconds.
    pub seconds: f64,
}

/// Returns one row per branch, in the matrix's order.
pub fn rows(matrix: &Matrix) -> Vec<BranchRow> {
    let (windows, tasks) = (matrix.windows(), matrix.tasks());
    let branches = matrix.branches.iter();
    branches
        .map(|b| BranchRow::of(b, &windows, &tasks))
        .collect()
}

impl BranchRow {
    /// Builds the row with the measurements on the first of the matrix's `windows`; the others are
    /// separate.
    fn of(branch: &Branch, windows: &[Windows], tasks: &[Accuracy]) -> BranchRow {
        let report = &branch.report;
        let config = &report.quantize_config;
        let summary = report.summary(Measure::Weights);
        let output = match Measure::of([report]) {
            Measure::Output => Some(report.summary(Measure::Output)),
            Measure::Weights => None,
        };
        let receipt = branch.receipt.as_ref();
        let all = branch.measured_among(windows).into_iter();
        let (measured, others): (Vec<Measured>, _) =
            all.partition(|it| windows.first().is_some_and(|first| it.windows.same(first)));
        let measured = measured.first();
        BranchRow {
            branch: report.branch.clone(),
            bits: config.bits,
            group_size: config.group_size,
            mixed: branch.mixed(),
            bits_per_weight: branch.bits_per_weight(),
            desc_act: config.desc_act,
            act_order: report.order().cell(),
            sym: config.sym,
            damp_percent: report.solved().damp_percent,
            preset: report.preset,
            bytes: branch.bytes,
            mean_output_error: output.map(|it| it.mean_error),
            worst_output_error: output.map(|it| it.worst_error),
            mean_output_ratio: output.map(|it| it.mean_ratio),
            last_block_error: report.last_block_error(),
            mean_objective: report.mean_objective(),
            mean_error: summary.mean_error,
            worst_error: summary.worst_error,
            mean_ratio: summary.mean_ratio,
            perplexity: measured.map(|it| it.perplexity),
            text: measured.map(|it| it.windows.text.clone()),
            window: measured.map(|it| it.windows.window),
            dense_perplexity: measured.and_then(|it| it.dense_perplexity),
            kl_divergence: measured.and_then(|it| it.kl_divergence),
            top1_agreement: measured.and_then(|it| it.top1_agreement),
            on_other_windows: others,
            accuracies: tasks
                .iter()
                .filter_map(|task| branch.accuracy_on(task))
                .collect(),
            verified: receipt.map(|r| r.pass),
            seconds: report.seconds,
        }
    }
}

/// Formats the rows as CSV (RFC 4180), with the names of [`BranchRow`]'s fields as header.
pub fn csv(rows: &[BranchRow]) -> String {
    let rows = rows.iter().map(|row| {
        [
            row.branch.clone(),
            row.bits.to_string(),
            row.group_size.to_string(),
            row.mixed.to_string(),
            measured(row.bits_per_weight),
            row.desc_act.to_string(),
            row.act_order.to_owned(),
            row.sym.to_string(),
            row.damp_percent.to_string(),
            row.preset.name().to_owned(),
            row.bytes.to_string(),
            measured(row.mean_output_error),
            measured(row.worst_output_error),
            measured(row.mean_output_ratio),
            measured(row.last_block_error),
            measured(row.mean_objective),
            row.mean_error.to_string(),
            row.worst_error.to_string(),
            row.mean_ratio.to_string(),
            measured(row.perplexity),
            row.text.clone().unwrap_or_default(),
            measured(row.window),
            measured(row.dense_perplexity),
            measured(row.kl_divergence),
            measured(row.top1_agreement),
            others(&row.on_other_windows),
            accuracies(&row.accuracies),
            measured(row.verified),
            row.seconds.to_string(),
        ]
    });
    csv_text(COLUMNS, rows)
}

/// Names of [`BranchRow`]'s fields, in the order of the table.
const COLUMNS: [&str; 29] = [
    "branch",
    "bits",
    "group_size",
    "mixed",
    "bits_per_weight",
    "desc_act",
    "act_order",
    "sym",
    "damp_percent",
    "preset",
    "bytes",
    "mean_output_error",
    "worst_output_error",
    "mean_output_ratio",
    "last_block_error",
    "mean_objective",
    "mean_error",
    "worst_error",
    "mean_ratio",
    "perplexity",
    "text",
    "window",
    "dense_perplexity",
    "kl_divergence",
    "top1_agreement",
    "on_other_windows",
    "accuracies",
    "verified",
    "seconds",
];

/// Formats measurements as `"19.099 (eval.json, windows of 512)"`.
fn others(others: &[Measured]) -> String {
    let all = others
        .iter()
        .map(|it| format!("{} ({})", it.perplexity, it.windows.name()));
    all.collect::<Vec<_>>().join("; ")
}

/// Formats accuracies as `"0.552 (pubmedqa, 3 shots)"`.
fn accuracies(all: &[Accuracy]) -> String {
    let all = all
        .iter()
        .map(|it| format!("{} ({})", it.accuracy, it.task));
    all.collect::<Vec<_>>().join("; ")
}

fn measured(value: Option<impl ToString>) -> String {
    value.map_or_else(String::new, |v| v.to_string())
}
