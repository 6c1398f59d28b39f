//! `report.html`: one file, without network access or a framework.

use gptq_plan::Measure;
use minijinja::value::Serde;
use minijinja::{Environment, Value, context};
use serde::Serialize;

use crate::branch_page::BranchPage;
use crate::plot::{Point, scatter};
use crate::provenance::provenance;
use crate::{Accuracy, Branch, BranchRow, Matrix, ReportError, Windows, number, rows};

const TEMPLATE: &str = include_str!("../templates/report.html");
const STYLE: &str = include_str!("../templates/report.css");
const SCRIPT: &str = include_str!("../templates/report.js");

/// A column of the table of branches.
#[derive(Serialize)]
struct Column {
    name: String,
    /// Explanation, where the name needs one.
    hint: String,
    /// One cell per branch.
    cells: Vec<Cell>,
}

#[derive(Serialize)]
struct Cell {
    /// Sort key; empty if there is none.
    value: String,
    text: String,
}

/// Renders the page about all branches of `matrix`; everything that came from files is escaped.
pub fn html(matrix: &Matrix) -> Result<String, ReportError> {
    let mut environment = Environment::new();
    let failed = |source| ReportError::Template {
        template: "report.html".to_owned(),
        source,
    };
    environment
        .add_template("report.html", TEMPLATE)
        .map_err(failed)?;
    let measure = Measure::of(matrix.branches.iter().map(|branch| &branch.report));
    let branches: Vec<BranchPage> = matrix.branches.iter().map(BranchPage::new).collect();
    let page = environment.get_template("report.html").map_err(failed)?;
    page.render(context! {
        style => Value::from_safe_string(STYLE.to_owned()),
        script => Value::from_safe_string(SCRIPT.to_owned()),
        model => matrix.model(),
        compared => measure == Measure::Output,
        columns => Serde(columns(&rows(matrix), measure)),
        plot => plot(matrix).map(Serde),
        accuracy => accuracy_plot(matrix).map(Serde),
        branches => Serde(branches),
        provenance => Serde(provenance(matrix)),
    })
    .map_err(failed)
}

/// Builds the columns of numbers. A column without any value is left out, and so are the errors
/// against the weights if `measure` says that all branches have output errors.
fn columns(rows: &[BranchRow], measure: Measure) -> Vec<Column> {
    type Show = fn(&BranchRow) -> Option<(String, String)>;
    fn plain(value: impl ToString) -> Option<(String, String)> {
        Some((value.to_string(), value.to_string()))
    }
    fn shown(value: f64, text: String) -> Option<(String, String)> {
        Some((value.to_string(), text))
    }
    let error = |name, hint, show: Show| (name, hint, show);
    let errors: [(&str, &str, Show); 3] = match measure {
        Measure::Output => [
            error(
                "Output error",
                "mean over the linear layers, against the dense model's output",
                |r| r.mean_output_error.and_then(|e| shown(e, number::error(e))),
            ),
            error("Worst", "largest output error of a linear layer", |r| {
                r.worst_output_error
                    .and_then(|e| shown(e, number::error(e)))
            }),
            error(
                "Of RTN",
                "mean ratio to round-to-nearest's output error, on the branch's inputs",
                |r| {
                    r.mean_output_ratio
                        .and_then(|e| shown(e, format!("{e:.3}")))
                },
            ),
        ],
        Measure::Weights => [
            error(
                "Weight error",
                "mean over the linear layers, against the original weights, on the branch's own inputs",
                |r| shown(r.mean_error, number::error(r.mean_error)),
            ),
            error("Worst", "largest weight error of a linear layer", |r| {
                shown(r.worst_error, number::error(r.worst_error))
            }),
            error("Of RTN", "mean ratio to round-to-nearest's error", |r| {
                shown(r.mean_ratio, format!("{:.3}", r.mean_ratio))
            }),
        ],
    };
    let [mean_error, worst_error, ratio] = errors;
    let columns: [(&str, &str, Show); 17] = [
        ("Bits", "", |r| match r.mixed {
            true => plain("mixed"),
            false => plain(r.bits),
        }),
        (
            "Group",
            "inputs that share a scale; -1 is a whole row",
            |r| match r.mixed {
                true => plain("mixed"),
                false => plain(r.group_size),
            },
        ),
        (
            "Per weight",
            "bits of the quantized linear layers, with scales, zero points and g_idx",
            |r| {
                r.bits_per_weight
                    .and_then(|bits| shown(bits, format!("{bits:.3}")))
            },
        ),
        (
            "Act order",
            "static: with groups of columns in their original order",
            |r| plain(r.act_order),
        ),
        (
            "Damp",
            "requested, as a fraction of the mean diagonal",
            |r| plain(r.damp_percent),
        ),
        ("Size", "weight files", |r| {
            Some((r.bytes.to_string(), number::decimal_size(r.bytes)))
        }),
        mean_error,
        worst_error,
        ratio,
        (
            "Last block",
            "error of the last block's output against the dense model's",
            |r| r.last_block_error.and_then(|e| shown(e, number::error(e))),
        ),
        (
            "Objective",
            "the solver's objective, mean over the linear layers",
            |r| r.mean_objective.and_then(|e| shown(e, number::error(e))),
        ),
        (PERPLEXITY, "on held-out text", |r| {
            r.perplexity.and_then(|p| shown(p, format!("{p:.3}")))
        }),
        ("Over dense", "perplexity over the dense model's", |r| {
            let (own, dense) = r.perplexity.zip(r.dense_perplexity)?;
            shown(own / dense, number::over(own, dense))
        }),
        ("KL", "mean KL divergence from the dense model, nats", |r| {
            r.kl_divergence.and_then(|k| shown(k, format!("{k:.4}")))
        }),
        (
            "Top-1",
            "share of positions with the dense model's most likely token",
            |r| {
                let share = r.top1_agreement?;
                shown(share, format!("{:.2} %", 100.0 * share))
            },
        ),
        ("Verified", "by gptq verify", |r| {
            r.verified
                .and_then(|pass| plain(if pass { "passed" } else { "failed" }))
        }),
        ("Time", "spent on this branch alone", |r| {
            shown(r.seconds, number::seconds(r.seconds))
        }),
    ];
    let columns = columns
        .into_iter()
        .filter(|(_, _, show)| rows.iter().any(|r| show(r).is_some()));
    let columns = columns.map(|(name, hint, show)| Column {
        name: name.to_owned(),
        hint: hint.to_owned(),
        cells: rows.iter().map(|row| Cell::of(show(row))).collect(),
    });
    let mut columns: Vec<Column> = columns.collect();
    // Measurements on other windows get separate columns, named after their windows.
    let measured = rows
        .iter()
        .find_map(|row| Some((row.text.as_ref()?, row.window?)));
    let others = other_windows(rows);
    if let (Some((text, window)), false) = (measured, others.is_empty()) {
        let own = columns.iter_mut().find(|column| column.name == PERPLEXITY);
        if let Some(column) = own {
            column.name = format!("{PERPLEXITY}, {text}, windows of {window}");
        }
    }
    columns.extend(others.iter().map(|windows| {
        Column {
            name: format!("{PERPLEXITY}, {}", windows.name()),
            hint: "on these windows only: not comparable with other columns".to_owned(),
            cells: (rows.iter())
                .map(|row| {
                    let mut others = row.on_other_windows.iter();
                    let own = others.find(|it| it.windows.same(windows));
                    Cell::of(own.map(|it| {
                        let over = it
                            .dense_perplexity
                            .map(|dense| number::over(it.perplexity, dense));
                        let over = over.map_or_else(String::new, |over| format!(" ({over})"));
                        (
                            it.perplexity.to_string(),
                            format!("{:.3}{over}", it.perplexity),
                        )
                    }))
                })
                .collect(),
        }
    }));
    columns.extend(task_columns(rows));
    columns
}

/// Builds two columns for each task: accuracy, and its difference from the dense model's where one has it.
fn task_columns(rows: &[BranchRow]) -> Vec<Column> {
    let mut tasks: Vec<&Accuracy> = Vec::new();
    for accuracy in rows.iter().flat_map(|row| &row.accuracies) {
        if !tasks.iter().any(|it| it.same(accuracy)) {
            tasks.push(accuracy);
        }
    }
    let column =
        |name: String, hint: &str, show: &dyn Fn(&BranchRow) -> Option<(String, String)>| Column {
            name,
            hint: hint.to_owned(),
            cells: rows.iter().map(|row| Cell::of(show(row))).collect(),
        };
    let mut columns = Vec::new();
    for task in tasks {
        let on = |row: &BranchRow| row.accuracies.iter().find(|it| it.same(task)).cloned();
        let hint =
            "share of questions whose right answer is the likeliest, with its standard error";
        columns.push(column(format!("Accuracy, {}", task.task), hint, &|row| {
            let own = on(row)?;
            Some((own.accuracy.to_string(), own.percent()))
        }));
        let over = |row: &BranchRow| {
            let own = on(row)?;
            let over = own.over()?;
            Some(((own.accuracy - own.dense_accuracy?).to_string(), over))
        };
        if rows.iter().any(|row| over(row).is_some()) {
            let hint = "difference from the dense model's accuracy, in percentage points";
            columns.push(column(format!("Over dense, {}", task.task), hint, &over));
        }
    }
    columns
}

const PERPLEXITY: &str = "Perplexity";

/// Returns the windows of the separate measurements of all rows.
fn other_windows(rows: &[BranchRow]) -> Vec<Windows> {
    let mut all: Vec<Windows> = Vec::new();
    for measured in rows.iter().flat_map(|row| &row.on_other_windows) {
        if !all.iter().any(|it| it.same(&measured.windows)) {
            all.push(measured.windows.clone());
        }
    }
    all
}

impl Cell {
    /// Makes a cell; a dash if there is no value.
    fn of(shown: Option<(String, String)>) -> Cell {
        let (value, text) = shown.unwrap_or((String::new(), "–".to_owned()));
        Cell { value, text }
    }
}

/// Size against perplexity.
#[derive(Serialize)]
struct Plot {
    svg: Value,
    text: String,
    window: usize,
    tokens: usize,
    /// Branches measured on other text, which are not comparable.
    left_out: Vec<String>,
}

/// Size against accuracy.
#[derive(Serialize)]
struct AccuracyPlot {
    svg: Value,
    task: String,
    questions: Option<usize>,
    /// Branches that were not asked this task.
    left_out: Vec<String>,
}

/// Returns a branch's settings in a few words.
fn short(branch: &Branch) -> String {
    let config = &branch.report.quantize_config;
    if branch.mixed() {
        return format!("mixed, {:.2}", branch.bits_per_weight().unwrap_or_default());
    }
    match i64::from(config.group_size) {
        -1 => format!("{} bits, rows", config.bits),
        n => format!("{} bits, {n}", config.bits),
    }
}

/// Plots the task that most branches were asked.
fn accuracy_plot(matrix: &Matrix) -> Option<AccuracyPlot> {
    let task = matrix.tasks().into_iter().next()?;
    let both = matrix.branches.iter().map(|b| (b, b.accuracy_on(&task)));
    let (drawn, others): (Vec<_>, Vec<_>) = both.partition(|(_, own)| own.is_some());
    let drawn: Vec<(&Branch, Accuracy)> = drawn
        .into_iter()
        .filter_map(|(branch, own)| Some((branch, own?)))
        .collect();
    let points = drawn.iter().map(|(branch, own)| {
        let twins = drawn
            .iter()
            .filter(|(b, _)| short(b) == short(branch))
            .count();
        let name = &branch.report.branch;
        Point {
            x: branch.bytes as f64,
            y: 100.0 * own.accuracy,
            label: if twins == 1 {
                short(branch)
            } else {
                name.clone()
            },
            title: format!(
                "{name}\n{}\naccuracy {}",
                number::decimal_size(branch.bytes),
                own.percent()
            ),
        }
    });
    let points: Vec<Point> = points.collect();
    let dense = drawn.iter().find_map(|(_, own)| own.dense_accuracy);
    let svg = scatter(
        &points,
        dense.map(|value| (100.0 * value, "dense model")),
        ("size of the weight files", "accuracy"),
        (
            |bytes| number::decimal_size(bytes as u64),
            |value| format!("{value:.1} %"),
        ),
    );
    Some(AccuracyPlot {
        svg: Value::from_safe_string(svg),
        questions: task.questions,
        task: task.task,
        left_out: others
            .iter()
            .map(|(b, _)| b.report.branch.clone())
            .collect(),
    })
}

fn plot(matrix: &Matrix) -> Option<Plot> {
    let windows = matrix.windows().into_iter().next()?;
    let measured = |branch: &Branch| branch.measured_on(&windows);
    let (drawn, others): (Vec<&Branch>, Vec<&Branch>) = (matrix.branches.iter())
        .filter(|b| !b.measured().is_empty())
        .partition(|b| measured(b).is_some());
    let points = drawn.iter().map(|branch| {
        let twins = drawn.iter().filter(|b| short(b) == short(branch)).count();
        let name = &branch.report.branch;
        let value = measured(branch).map_or(f64::NAN, |it| it.perplexity);
        Point {
            x: branch.bytes as f64,
            y: value,
            label: if twins == 1 {
                short(branch)
            } else {
                name.clone()
            },
            title: format!(
                "{name}\n{}\nperplexity {value:.4}",
                number::decimal_size(branch.bytes)
            ),
        }
    });
    let points: Vec<Point> = points.collect();
    let dense = drawn.iter().find_map(|b| measured(b)?.dense_perplexity);
    let svg = scatter(
        &points,
        dense.map(|value| (value, "dense model")),
        ("size of the weight files", "perplexity"),
        (
            |bytes| number::decimal_size(bytes as u64),
            |value| format!("{value:.2}"),
        ),
    );
    Some(Plot {
        svg: Value::from_safe_string(svg),
        text: windows.text.clone(),
        window: windows.window,
        tokens: windows.tokens,
        left_out: others.iter().map(|b| b.report.branch.clone()).collect(),
    })
}
