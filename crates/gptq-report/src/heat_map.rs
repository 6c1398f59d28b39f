//! A branch's errors as a map of layers and linear layers, coloured by the logarithm of the error. The experts of a block
//! share a cell.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use gptq_plan::{LinearReport, Measure};
use serde::Serialize;

use crate::number;

/// Data of the table that the template draws.
#[derive(Serialize)]
pub(crate) struct HeatMap {
    /// One column per linear layer of a block.
    pub columns: Vec<Column>,
    /// One row per block.
    pub rows: Vec<HeatRow>,
    /// The smallest and the largest error.
    pub range: [String; 2],
}

#[derive(Serialize)]
pub(crate) struct Column {
    /// Short name, such as `q`.
    pub label: String,
    /// Its name within the block.
    pub name: String,
}

#[derive(Serialize)]
pub(crate) struct HeatRow {
    pub layer: usize,
    /// One per column; `None` if the linear layer was not quantized.
    pub cells: Vec<Option<Cell>>,
}

#[derive(Serialize)]
pub(crate) struct Cell {
    pub text: String,
    pub title: String,
    /// Position between the smallest and the largest error, in percent.
    pub heat: u32,
}

impl HeatMap {
    pub(crate) fn new(linears: &[LinearReport], measure: Measure) -> HeatMap {
        let mut names: Vec<Cow<'_, str>> = Vec::new();
        let mut seen = BTreeSet::new();
        type Row<'a> = BTreeMap<Cow<'a, str>, Vec<&'a LinearReport>>;
        let mut layers: BTreeMap<usize, Row<'_>> = BTreeMap::new();
        for linear in linears {
            let name = kind(linear);
            if seen.insert(name.clone()) {
                names.push(name.clone());
            }
            let row = layers.entry(linear.layer).or_default();
            row.entry(name).or_default().push(linear);
        }
        let cells = layers.values().flat_map(BTreeMap::values);
        let errors: Vec<f64> = cells.map(|cell| mean_error(cell, measure)).collect();
        let errors = || errors.iter().copied();
        let low = errors().filter(|&e| e > 0.0).fold(f64::INFINITY, f64::min);
        let high = errors().fold(0.0, f64::max);
        let heat = |error: f64| {
            let place = (error.max(low) / low).ln() / (high / low).ln();
            // With fewer than two distinct errors there is no position.
            if place.is_finite() {
                (100.0 * place).round() as u32
            } else {
                0
            }
        };
        let rows = layers.iter().map(|(&layer, row)| HeatRow {
            layer,
            cells: names
                .iter()
                .map(|name| {
                    let linears = row.get(name)?;
                    let heat = heat(mean_error(linears, measure));
                    Some(match linears[..] {
                        [linear] => Cell::new(linear, measure, heat),
                        _ => Cell::of_experts(name, linears, measure, heat),
                    })
                })
                .collect(),
        });
        let range = if low.is_finite() {
            [low, high]
        } else {
            [0.0; 2]
        };
        HeatMap {
            rows: rows.collect(),
            range: range.map(number::error),
            columns: names
                .iter()
                .map(|name| Column {
                    label: label(name).to_owned(),
                    name: name.clone().into_owned(),
                })
                .collect(),
        }
    }
}

/// Returns the mean error of some linear layers.
fn mean_error(linears: &[&LinearReport], measure: Measure) -> f64 {
    let errors = linears.iter().map(|linear| linear.errors(measure)[0]);
    errors.sum::<f64>() / linears.len() as f64
}

impl Cell {
    /// The linear layers `name` of a block's experts.
    fn of_experts(name: &str, linears: &[&LinearReport], measure: Measure, heat: u32) -> Cell {
        let mean = mean_error(linears, measure);
        let error = |linear: &LinearReport| linear.errors(measure)[0];
        let worst = linears.iter().max_by(|a, b| error(a).total_cmp(&error(b)));
        let worst = worst.map_or_else(String::new, |linear| {
            format!(
                "\nworst {} of {}",
                number::error(error(linear)),
                linear.name
            )
        });
        let mut ratios = 0.0;
        linears.iter().for_each(|it| ratios += it.of_rtn(measure));
        Cell {
            text: number::short_error(mean),
            title: format!(
                "{name} of {} experts\nmean {} {}, ratio to round-to-nearest {:.3}{worst}",
                linears.len(),
                measure.name(),
                number::error(mean),
                ratios / linears.len() as f64
            ),
            heat,
        }
    }

    fn new(linear: &LinearReport, measure: Measure, heat: u32) -> Cell {
        let [n_out, n_in] = linear.shape;
        let [error, _] = linear.errors(measure);
        let against = |name: &str, measure| {
            let [error, rtn] = linear.errors(measure).map(number::error);
            let ratio = linear.of_rtn(measure);
            format!("\n{name} {error}, round-to-nearest {rtn} (ratio {ratio:.3})")
        };
        let output = match linear.output_error {
            Some(_) => against("output error", Measure::Output),
            None => String::new(),
        };
        let objective = match linear.solver_objective {
            Some(objective) => format!("\nsolver's objective {}", number::error(objective)),
            None => String::new(),
        };
        let gains: String = (linear.gains.used())
            .map(|(option, gain)| {
                format!(
                    "\n{} gained {}",
                    option.replace('_', " "),
                    number::error(gain)
                )
            })
            .collect();
        Cell {
            text: number::short_error(error),
            title: format!(
                "{}{output}{objective}{}\n{n_out} × {n_in}, {} bits, group {}\ndamping {}, dead columns {}{gains}",
                linear.name,
                against("weight error", Measure::Weights),
                linear.bits,
                linear.group_size,
                linear.damp_percent,
                linear.dead_columns
            ),
            heat,
        }
    }
}

/// Returns a linear layer's name within its block: `self_attn.q_proj`.
pub(crate) fn within_block(linear: &LinearReport) -> &str {
    let index = format!(".{}.", linear.layer);
    match linear.name.split_once(&index) {
        Some((_, name)) => name,
        None => &linear.name,
    }
}

/// Returns the name that a linear layer has in common with those of other experts, `mlp.experts.*.up_proj`; of other
/// linear layers the name itself.
pub(crate) fn kind(linear: &LinearReport) -> Cow<'_, str> {
    kind_of(within_block(linear))
}

/// Returns the same for a name within a block.
pub(crate) fn kind_of(name: &str) -> Cow<'_, str> {
    let expert = name.split_once(".experts.").and_then(|(path, rest)| {
        let (number, name) = rest.split_once('.')?;
        let is_number = !number.is_empty() && number.bytes().all(|c| c.is_ascii_digit());
        is_number.then(|| format!("{path}.experts.*.{name}"))
    });
    expert.map_or(Cow::Borrowed(name), Cow::Owned)
}

/// Returns the short name in common use: `q`.
pub(crate) fn label(name: &str) -> &str {
    let last = name.rsplit('.').next().unwrap_or(name);
    last.strip_suffix("_proj").unwrap_or(last)
}

#[cfg(test)]
mod tests {
    use gptq_format::{Bits, GroupSize};
    use gptq_solver::Gains;

    use super::*;

    fn linear(layer: usize, name: &str, relative_error: f64) -> LinearReport {
        LinearReport {
            layer,
            name: format!("model.layers.{layer}.{name}"),
            shape: [64, 32],
            bits: Bits::Four,
            group_size: GroupSize::Columns(32),
            relative_error,
            rtn_error: 2.0 * relative_error,
            ratio: 0.5,
            output_error: Some(0.25),
            rtn_output_error: Some(0.5),
            solver_objective: None,
            gains: Gains::default(),
            damp_percent: 0.1,
            dead_columns: 0,
            seconds: 0.0,
            digests: None,
        }
    }

    #[test]
    fn heat_is_the_place_on_a_log_scale_and_skipped_linears_stay_empty() {
        let linears = [
            linear(0, "self_attn.q_proj", 1e-4),
            linear(0, "mlp.down_proj", 1e-3),
            linear(11, "self_attn.q_proj", 1e-2),
        ];
        let map = HeatMap::new(&linears, Measure::Weights);
        let labels: Vec<&str> = map.columns.iter().map(|c| c.label.as_str()).collect();
        assert_eq!(labels, ["q", "down"]);
        let heat = |row: usize, column: usize| map.rows[row].cells[column].as_ref().map(|c| c.heat);
        assert_eq!((heat(0, 0), heat(0, 1)), (Some(0), Some(50)));
        assert_eq!((heat(1, 0), heat(1, 1)), (Some(100), None));
        assert_eq!(map.rows[1].layer, 11);
    }

    #[test]
    fn experts_share_a_cell_and_94_blocks_of_128_are_drawn_in_no_time() {
        let experts = (0..128).flat_map(|expert| {
            let parts = ["gate", "up", "down"];
            parts.map(|part| format!("mlp.experts.{expert}.{part}_proj"))
        });
        let attention = ["q", "k", "v", "o"].map(|part| format!("self_attn.{part}_proj"));
        let names: Vec<String> = attention.into_iter().chain(experts).collect();
        let linears: Vec<LinearReport> = (0..94)
            .flat_map(|layer| names.iter().map(move |name| linear(layer, name, 1e-3)))
            .collect();
        let started = std::time::Instant::now();
        let map = HeatMap::new(&linears, Measure::Weights);
        assert_eq!((map.rows.len(), map.columns.len()), (94, 7));
        let names: Vec<&str> = map.columns.iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names[3..5], ["self_attn.o_proj", "mlp.experts.*.gate_proj"]);
        let cell = map.rows[1].cells[6].as_ref().unwrap();
        assert!(cell.title.contains("of 128 experts"), "{}", cell.title);
        assert!(started.elapsed().as_secs() < 5);
    }

    #[test]
    fn equal_or_zero_errors_are_drawn_cold() {
        for error in [0.0, 1e-3] {
            let linears = [linear(0, "a", error), linear(1, "a", error)];
            let map = HeatMap::new(&linears, Measure::Weights);
            assert!(
                map.rows
                    .iter()
                    .all(|r| r.cells[0].as_ref().unwrap().heat == 0)
            );
        }
    }
}
