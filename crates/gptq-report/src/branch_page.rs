//! Contents of the page about one branch.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use gptq_format::Contents;
use gptq_plan::{BranchReport, LinearReport, Measure, Share, Tuning, TuningLoss};
use gptq_spec::ModelConfig;
use minijinja::Value;
use serde::Serialize;

use crate::Branch;
use crate::expert_map::{ExpertMap, expert_map};
use crate::heat_map::{HeatMap, kind, kind_of, label};
use crate::number;
use crate::plot::{Series, lines};

/// Section of one branch.
#[derive(Serialize)]
pub(crate) struct BranchPage {
    pub name: String,
    pub settings: String,
    /// Reference and inputs of the errors.
    pub measure: &'static str,
    pub compared: Option<Share>,
    pub heat: HeatMap,
    /// Errors through the layers (SVG).
    pub growth: Value,
    /// True if `growth` includes the blocks' output errors of the run.
    pub blocks: bool,
    /// True if `growth` includes the blocks' errors on fresh text.
    pub fresh: bool,
    pub tuning: Option<TuningFigure>,
    pub experts: Option<ExpertMap>,
    pub kinds: Vec<LinearKind>,
    /// Options beyond plain GPTQ that any linear layer used, by their recipe names.
    pub options: Vec<&'static str>,
    /// Linear layers with something out of the ordinary that are listed, [`LISTED`] at most.
    pub unusual: Vec<Unusual>,
    /// Number of all of them.
    pub unusual_count: usize,
    pub damp_percent: f64,
    pub stages: Vec<Time>,
    pub phases: Vec<Time>,
}

/// Linear layers that a page lists one by one: a mixture may have tens of thousands.
const LISTED: usize = 500;

/// Learning curves of the blocks that were tuned.
#[derive(Serialize)]
pub(crate) struct TuningFigure {
    /// A line for each block (SVG).
    pub curves: Value,
    pub blocks: usize,
    pub steps: usize,
    /// Mean distances to the dense blocks' outputs, before and after.
    pub output: Option<[String; 2]>,
    /// Divergence of the predictions, before and after.
    pub predictions: Option<[String; 2]>,
}

/// All linear layers of one name.
#[derive(Serialize)]
pub(crate) struct LinearKind {
    pub label: String,
    pub error: String,
    pub rtn: String,
    pub ratio: String,
    /// The ratio in percent, for a bar.
    pub percent: f64,
    /// Mean gain of each option over the linear layers that used it.
    pub gains: Vec<String>,
}

/// A linear layer with raised damping, dead columns, or an error above that of round-to-nearest.
#[derive(Serialize)]
pub(crate) struct Unusual {
    pub name: String,
    pub damp_percent: f64,
    pub raised: bool,
    pub dead_columns: usize,
    pub ratio: String,
    pub worse: bool,
}

#[derive(Serialize)]
pub(crate) struct Time {
    pub name: String,
    pub seconds: String,
    /// Share of the total, in percent.
    pub percent: f64,
}

impl BranchPage {
    pub(crate) fn new(branch: &Branch) -> BranchPage {
        let report = &branch.report;
        let damp_percent = report.solved().damp_percent;
        let blocks = branch.receipt.iter().flat_map(|r| &r.blocks);
        let fresh: Vec<_> = blocks
            .filter_map(|b| {
                let error = b.relative_error?;
                let title = format!("layer {}: {}", b.layer, number::error(error));
                Some((b.layer as f64, error, title))
            })
            .collect();
        let has_fresh = !fresh.is_empty();
        let measure = Measure::of([report]);
        let (unusual, unusual_count) = unusual(&report.linears, measure, damp_percent);
        let blocks = report.blocks.iter().map(|b| {
            let title = format!("block {}: {}", b.layer, number::error(b.output_error));
            (b.layer as f64, b.output_error, title)
        });
        let growth = lines(
            &[
                through("rtn", &report.linears, |l| l.errors(measure)[1]),
                through("own", &report.linears, |l| l.errors(measure)[0]),
                Series {
                    class: "block",
                    points: blocks.collect(),
                },
                Series {
                    class: "fresh",
                    points: fresh,
                },
            ],
            ("layer", "relative error"),
            (|layer| format!("{layer}"), |error| format!("{error:.0e}")),
        );
        let options = options(&report.linears);
        let phases = report.phases.iter().map(|p| (p.phase.clone(), p.seconds));
        BranchPage {
            name: report.branch.clone(),
            settings: settings(branch),
            measure: measure.name(),
            compared: report.compared,
            heat: HeatMap::new(&report.linears, measure),
            growth: Value::from_safe_string(growth),
            blocks: !report.blocks.is_empty(),
            fresh: has_fresh,
            tuning: tuning(report),
            experts: expert_map(&report.blocks),
            kinds: kinds(&report.linears, measure, &options),
            options,
            unusual,
            unusual_count,
            damp_percent,
            stages: times(solving(&report.linears, &taps(&branch.config))),
            phases: times(phases.collect()),
        }
    }
}

/// Draws the learning curves, each relative to where its block began.
fn tuning(report: &BranchReport) -> Option<TuningFigure> {
    let blocks = report.blocks.iter();
    let tuned: Vec<_> = blocks
        .filter_map(|block| Some((block.layer, block.tuning.as_ref()?)))
        .collect();
    let steps = report.method.map_or(0, |method| method.tune);
    let series = tuned.iter().map(|(layer, tuning)| {
        let run = steps.div_ceil(tuning.curve.len().max(1));
        let points = tuning.curve.iter().enumerate();
        let points = points.filter(|(_, distance)| **distance > 0.0 && tuning.before > 0.0);
        let points = points.map(|(at, distance)| {
            let relative = distance / tuning.before;
            let title = format!("block {layer}, step {}: {relative:.3}", at * run);
            ((at * run) as f64, relative, title)
        });
        Series {
            class: "tuned",
            points: points.collect(),
        }
    });
    let series: Vec<Series> = series.collect();
    let curves = lines(
        &series,
        ("step", "distance, 1 at the start"),
        (
            |step| format!("{step}"),
            |distance| format!("{distance:.2}"),
        ),
    );
    let mean = |loss: TuningLoss, of: fn(&Tuning) -> f64| {
        let all: Vec<f64> = (tuned.iter())
            .filter(|(_, tuning)| tuning.loss == loss)
            .map(|(_, tuning)| of(tuning))
            .collect();
        (!all.is_empty()).then(|| number::error(all.iter().sum::<f64>() / all.len() as f64))
    };
    let span = |loss| Some([mean(loss, |it| it.before)?, mean(loss, |it| it.after)?]);
    (!tuned.is_empty()).then(|| TuningFigure {
        curves: Value::from_safe_string(curves),
        blocks: tuned.len(),
        steps,
        output: span(TuningLoss::Output),
        predictions: span(TuningLoss::Predictions),
    })
}

/// Summarizes the settings in one line.
fn settings(branch: &Branch) -> String {
    let report = &branch.report;
    let config = &report.quantize_config;
    let contents = Contents::of(config, Vec::new());
    let yes = |on: bool, what: &'static str| on.then_some(what);
    let groups = match i64::from(config.group_size) {
        -1 => "one group per row".to_owned(),
        n => format!("groups of {n}"),
    };
    let mut words = match &report.budget {
        Some(budget) => vec![
            format!("{:.3} bits per weight", budget.mean_bits),
            format!("a budget of {}", budget.budget_bits),
        ],
        None => vec![format!("{} bits", config.bits), groups],
    };
    words.extend([
        report.order().to_string(),
        if config.sym {
            "symmetric"
        } else {
            "asymmetric"
        }
        .to_owned(),
        format!("damping {}", report.solved().damp_percent),
    ]);
    let more = [
        yes(!config.true_sequential, "whole blocks at once"),
        yes(
            contents.mixed || contents.skips,
            "separate settings for some linear layers",
        ),
        yes(
            report.propagation == "dense",
            "calibrated on the dense model's hidden states",
        ),
    ];
    words.extend(more.into_iter().flatten().map(String::from));
    words.push(number::decimal_size(branch.bytes));
    words.join(" · ")
}

/// Returns the mean over each layer's linear layers.
fn through(
    class: &'static str,
    linears: &[LinearReport],
    value: impl Fn(&LinearReport) -> f64,
) -> Series {
    let mut layers: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for linear in linears {
        layers.entry(linear.layer).or_default().push(value(linear));
    }
    let points = layers.into_iter().map(|(layer, values)| {
        let mean = mean(&values);
        let title = format!("layer {layer}: {}", number::error(mean));
        (layer as f64, mean, title)
    });
    Series {
        class,
        points: points.collect(),
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Groups linear layers by `key`, in the order of first appearance.
fn grouped<'a>(
    linears: &'a [LinearReport],
    key: impl Fn(&'a LinearReport) -> Cow<'a, str>,
) -> Vec<(Cow<'a, str>, Vec<&'a LinearReport>)> {
    let mut groups: Vec<(Cow<'_, str>, Vec<&LinearReport>)> = Vec::new();
    let mut places = BTreeMap::new();
    for linear in linears {
        let key = key(linear);
        let at = *places.entry(key.clone()).or_insert(groups.len());
        if at == groups.len() {
            groups.push((key, Vec::new()));
        }
        groups[at].1.push(linear);
    }
    groups
}

/// Returns the options that any of the linear layers used.
fn options(linears: &[LinearReport]) -> Vec<&'static str> {
    let mut options = Vec::new();
    for (option, _) in linears.iter().flat_map(|l| l.gains.used()) {
        if !options.contains(&option) {
            options.push(option);
        }
    }
    options
}

fn kinds(linears: &[LinearReport], measure: Measure, options: &[&str]) -> Vec<LinearKind> {
    let kinds = grouped(linears, kind).into_iter();
    kinds
        .map(|(name, group)| {
            let of = |value: &dyn Fn(&LinearReport) -> f64| {
                mean(&group.iter().map(|l| value(l)).collect::<Vec<_>>())
            };
            let ratio = of(&|l| l.of_rtn(measure));
            let gain = |option: &&str| {
                let used = group.iter().flat_map(|l| l.gains.used());
                let gains: Vec<f64> = used.filter(|(o, _)| o == option).map(|(_, g)| g).collect();
                match gains.is_empty() {
                    true => String::new(),
                    false => number::error(mean(&gains)),
                }
            };
            LinearKind {
                label: label(&name).to_owned(),
                error: number::error(of(&|l| l.errors(measure)[0])),
                rtn: number::error(of(&|l| l.errors(measure)[1])),
                ratio: format!("{ratio:.3}"),
                percent: (100.0 * ratio).clamp(0.0, 100.0),
                gains: options.iter().map(gain).collect(),
            }
        })
        .collect()
}

/// Returns the linear layers with something out of the ordinary, of more than [`LISTED`] those with the largest ratios,
/// and the number of all.
fn unusual(linears: &[LinearReport], measure: Measure, asked: f64) -> (Vec<Unusual>, usize) {
    let raised = |l: &LinearReport| l.damp_percent != asked;
    let mut all: Vec<_> = (linears.iter().enumerate())
        .filter(|(_, l)| raised(l) || l.dead_columns > 0 || l.is_worse_than_rtn())
        .collect();
    let count = all.len();
    if count > LISTED {
        all.sort_by(|(_, a), (_, b)| b.of_rtn(measure).total_cmp(&a.of_rtn(measure)));
        all.truncate(LISTED);
        all.sort_by_key(|&(at, _)| at);
    }
    let listed = all.into_iter().map(|(_, l)| Unusual {
        name: l.name.clone(),
        damp_percent: l.damp_percent,
        raised: raised(l),
        dead_columns: l.dead_columns,
        ratio: format!("{:.3}", l.of_rtn(measure)),
        worse: l.is_worse_than_rtn(),
    });
    (listed.collect(), count)
}

/// Returns the seconds of solving by group of linear layers that share an input and a factor.
fn solving<'a>(
    linears: &'a [LinearReport],
    taps: &'a BTreeMap<String, String>,
) -> Vec<(String, f64)> {
    let tap = |l| {
        let name = kind(l);
        match taps.get(&*name) {
            Some(tap) => Cow::Borrowed(tap.as_str()),
            None => Cow::Owned(label(&name).to_owned()),
        }
    };
    let groups = grouped(linears, tap).into_iter();
    groups
        .map(|(name, group)| (name.into_owned(), group.iter().map(|l| l.seconds).sum()))
        .collect()
}

/// Returns the labels of all linear layers that share an input, such as "q, k, v", by the name of
/// each within its block; empty if `config` does not describe the model.
fn taps(config: &serde_json::Value) -> BTreeMap<String, String> {
    let mut taps = BTreeMap::new();
    let Ok(config) = ModelConfig::from_json(config.clone()) else {
        return taps;
    };
    for block in config.blocks() {
        for tap in block.taps() {
            let names = block.linears()[block.linears_of(tap)]
                .iter()
                .map(|it| &it.name);
            let mut labels: Vec<&str> = names.clone().map(|name| label(name)).collect();
            // Experts have the same labels.
            let mut seen = BTreeSet::new();
            labels.retain(|label| seen.insert(*label));
            let labels = labels.join(", ");
            match block.experts_at(tap) {
                None => taps.extend(names.map(|name| (name.clone(), labels.clone()))),
                Some(_) => {
                    let kinds = names.map(|name| kind_of(name).into_owned());
                    taps.extend(kinds.map(|kind| (kind, format!("experts' {labels}"))));
                }
            }
        }
    }
    taps
}

fn times(seconds: Vec<(String, f64)>) -> Vec<Time> {
    let total: f64 = seconds.iter().map(|(_, s)| s).sum();
    let all = seconds.into_iter().chain([("together".to_owned(), total)]);
    let times = all.map(|(name, seconds)| Time {
        name,
        seconds: number::seconds(seconds),
        percent: match total {
            t if t > 0.0 => 100.0 * seconds / t,
            _ => 0.0,
        },
    });
    match total > 0.0 {
        true => times.collect(),
        false => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn linear_layers_are_named_with_those_that_share_their_input() {
        let config = json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 128
        });
        let taps = taps(&config);
        assert_eq!(taps["self_attn.k_proj"], "q, k, v");
        assert_eq!(taps["self_attn.o_proj"], "o");
        assert_eq!(taps["mlp.gate_proj"], "gate, up");
        assert_eq!(taps["mlp.down_proj"], "down");
        assert!(self::taps(&json!({"model_type": "llama"})).is_empty());
    }
}
