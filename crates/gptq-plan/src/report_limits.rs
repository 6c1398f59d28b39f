//! Limits on the values of a `report.json`. It may come with a branch from elsewhere, and its
//! readers multiply shapes, scale plots and allocate by counts, so values that no run can produce
//! are refused on reading. Records of finished blocks in a journal, which become a report, have the
//! same limits.

use std::collections::BTreeSet;

use gptq_format::{GroupSize, MAX_REPORT};

use crate::{Allocation, BlockReport, BranchReport, Clamped, LinearReport, Perplexity, Receipt};

/// Limits on blocks, features and weights, as for a model's `config.json`.
const MAX_LAYERS: usize = 1 << 12;
const MAX_FEATURES: usize = 1 << 24;
const MAX_WEIGHTS: u64 = 1 << 48;
/// Limit on the magnitude of errors, ratios and damping, far above any measurement.
const MAX_NUMBER: f64 = 1e30;
/// Limit on perplexity: a broken model's may be the exponential of its largest logit.
const MAX_PERPLEXITY: f64 = 1e100;
/// Bytes of a linear's name, and linears of a block, with room for 512 experts.
const MAX_NAME: usize = 512;
const MAX_KINDS: usize = 2048;
/// Three centuries.
const MAX_SECONDS: f64 = 1e10;
/// Limit on the entries of short lists.
const MAX_ENTRIES: usize = 1 << 10;
/// Limits on the records of clamped states, and on the values in each.
const MAX_CLAMPED: usize = 1 << 16;
const MAX_COUNT: usize = 1 << 47;

/// Maximum size of a journal in bytes.
pub const MAX_JOURNAL: u64 = 1 << 30;
/// Maximum size of a linear layer's entry in a journal or a report, used to check a plan
/// beforehand.
pub(crate) const LINEAR: u64 = 2048;

/// Checks that a journal with the linear layers of all branches, and a report with those of each
/// one, are within the limits of their readers.
///
/// # Errors
/// A file would exceed its limit; the error is half a line.
pub(crate) fn check_plan(linears: &[usize]) -> Result<(), String> {
    let bytes = |linears: usize| (linears as u64).saturating_mul(LINEAR);
    let most = linears.iter().copied().max().unwrap_or_default();
    if bytes(most) > MAX_REPORT {
        return Err(format!(
            "{most} linear layers in one branch exceed the limit of a report.json, {}; skip some",
            MAX_REPORT / LINEAR
        ));
    }
    let all = linears.iter().sum();
    if bytes(all) > MAX_JOURNAL {
        return Err(format!(
            "{all} linear layers in all branches together exceed the limit of a run's journal, {}; quantize fewer \
             branches at a time with --branch",
            MAX_JOURNAL / LINEAR
        ));
    }
    Ok(())
}

/// Checks that every number is within its limits.
///
/// # Errors
/// Describes the first field that is out of range.
pub(crate) fn check(report: &BranchReport) -> Result<(), String> {
    let config = &report.quantize_config;
    group("quantize_config.group_size", config.group_size)?;
    number("damp_percent", report.solved().damp_percent)?;
    seconds("seconds", report.seconds)?;
    most("phases", report.phases.len(), MAX_ENTRIES)?;
    for (i, phase) in report.phases.iter().enumerate() {
        seconds(&format!("phases[{i}].seconds"), phase.seconds)?;
    }
    let calibration = &report.calibration;
    most("calibration.samples", calibration.samples, MAX_FEATURES)?;
    most("calibration.seq_len", calibration.seq_len, MAX_FEATURES)?;
    if let Some(measured) = &report.perplexity {
        measured.check()?;
    }
    report.budget.iter().try_for_each(budget)?;
    most("clamped", report.clamped.len(), MAX_CLAMPED)?;
    for (i, states) in report.clamped.iter().enumerate() {
        clamped(states).map_err(|why| format!("clamped[{i}].{why}"))?;
    }
    if let Some(share) = &report.compared {
        most("compared.windows", share.windows, MAX_FEATURES)?;
        most("compared.tokens", share.tokens, MAX_FEATURES)?;
    }
    most("blocks", report.blocks.len(), MAX_LAYERS)?;
    for (i, it) in report.blocks.iter().enumerate() {
        block(it).map_err(|why| format!("blocks[{i}].{why}"))?;
    }
    let linears = MAX_LAYERS * MAX_KINDS;
    most("linears", report.linears.len(), linears)?;
    let mut weights = 0;
    let mut kinds = BTreeSet::new();
    for (i, it) in report.linears.iter().enumerate() {
        linear(it).map_err(|why| format!("linears[{i}].{why}"))?;
        let index = format!(".{}.", it.layer);
        kinds.insert(it.name.split_once(&index).map_or(&*it.name, |name| name.1));
        if kinds.len() > MAX_KINDS {
            return Err(format!(
                "linears[{i}].name: over {MAX_KINDS} different linear layers in a block"
            ));
        }
        let [n_out, n_in] = it.shape.map(|n| n as u64);
        weights += n_out * n_in;
        if weights > MAX_WEIGHTS {
            return Err(format!("linears[{i}].shape: over 2^48 weights together"));
        }
    }
    Ok(())
}

/// Whether the numbers of a verification report lie within their limits.
///
/// # Errors
/// Describes the first field that is out of range.
pub(crate) fn receipt(receipt: &Receipt) -> Result<(), String> {
    if let Some(measured) = &receipt.perplexity {
        measured.check()?;
    }
    number("kl_divergence", receipt.kl_divergence.unwrap_or_default())?;
    number("top1_agreement", receipt.top1_agreement.unwrap_or_default())?;
    most("blocks", receipt.blocks.len(), MAX_LAYERS)?;
    for (i, block) in receipt.blocks.iter().enumerate() {
        below(&format!("blocks[{i}].layer"), block.layer, MAX_LAYERS)?;
        let error = block.relative_error.unwrap_or_default();
        number(&format!("blocks[{i}].relative_error"), error)?;
    }
    Ok(())
}

pub(crate) fn linear(linear: &LinearReport) -> Result<(), String> {
    below("layer", linear.layer, MAX_LAYERS)?;
    most("name", linear.name.len(), MAX_NAME)?;
    if linear.shape.contains(&0) || linear.shape.iter().any(|&n| n > MAX_FEATURES) {
        return Err(format!(
            "shape = {:?} is not within 1 and 2^24",
            linear.shape
        ));
    }
    group("group_size", linear.group_size)?;
    let gains = linear.gains.used();
    let gains = gains.map(|(name, gain)| (format!("gains.{name}"), gain));
    let numbers = [
        ("relative_error", linear.relative_error),
        ("rtn_error", linear.rtn_error),
        ("ratio", linear.ratio),
        ("damp_percent", linear.damp_percent),
    ];
    let numbers = numbers.map(|(name, value)| (name.to_owned(), value));
    for (name, value) in numbers.into_iter().chain(gains) {
        number(&name, value)?;
    }
    for (name, value) in [
        ("output_error", linear.output_error),
        ("rtn_output_error", linear.rtn_output_error),
        ("solver_objective", linear.solver_objective),
    ] {
        number(name, value.unwrap_or_default())?;
    }
    most("dead_columns", linear.dead_columns, MAX_FEATURES)?;
    seconds("seconds", linear.seconds)
}

fn budget(spent: &Allocation) -> Result<(), String> {
    number("budget.budget_bits", spent.budget_bits)?;
    number("budget.mean_bits", spent.mean_bits)?;
    most("budget.choices", spent.choices.len(), MAX_ENTRIES)?;
    let groups = MAX_LAYERS * MAX_KINDS;
    most("budget.groups", spent.groups.len(), groups)
}

pub(crate) fn block(block: &BlockReport) -> Result<(), String> {
    below("layer", block.layer, MAX_LAYERS)?;
    number("output_error", block.output_error)
}

pub(crate) fn clamped(states: &Clamped) -> Result<(), String> {
    below("layer", states.layer, MAX_LAYERS)?;
    most("values", states.values, MAX_COUNT)
}

impl Perplexity {
    /// Checks that its numbers are in the range of measurements.
    ///
    /// # Errors
    /// Describes the first field that is out of range.
    pub fn check(&self) -> Result<(), String> {
        most("perplexity.window", self.window, MAX_COUNT)?;
        most("perplexity.tokens", self.tokens, MAX_COUNT)?;
        within("perplexity.value", self.value, MAX_PERPLEXITY)?;
        within(
            "perplexity.dense",
            self.dense.unwrap_or_default(),
            MAX_PERPLEXITY,
        )
    }
}

fn group(field: &str, size: GroupSize) -> Result<(), String> {
    match size {
        GroupSize::Row => Ok(()),
        GroupSize::Columns(n) => most(field, n, MAX_FEATURES),
    }
}

fn number(field: &str, value: f64) -> Result<(), String> {
    within(field, value, MAX_NUMBER)
}

fn within(field: &str, value: f64, most: f64) -> Result<(), String> {
    match value.abs() <= most {
        true => Ok(()),
        false => Err(format!(
            "{field} = {value:e} is out of range (limit {most:e})"
        )),
    }
}

pub(crate) fn seconds(field: &str, value: f64) -> Result<(), String> {
    match (0.0..=MAX_SECONDS).contains(&value) {
        true => Ok(()),
        false => Err(format!(
            "{field} = {value:e} is not between 0 and {MAX_SECONDS:e}"
        )),
    }
}

fn most(field: &str, value: usize, limit: usize) -> Result<(), String> {
    match value <= limit {
        true => Ok(()),
        false => Err(format!("{field}: {value} is over the limit of {limit}")),
    }
}

fn below(field: &str, value: usize, limit: usize) -> Result<(), String> {
    most(field, value, limit - 1)
}

#[cfg(test)]
mod tests;
