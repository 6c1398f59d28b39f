//! Limits on the values of a `report.json`. It may come with a branch from elsewhere, and its
//! readers multiply shapes, scale plots and allocate by counts, so values that no run can produce
//! are refused on reading. Records of finished blocks in a journal, which become a report, have the
//! same limits.

use gptq_format::{GroupSize, MAX_REPORT};

/// Limits on blocks, features and weights, as for a model's `config.json`.
pub(crate) const MAX_LAYERS: usize = 1 << 12;
pub(crate) const MAX_FEATURES: usize = 1 << 24;
pub(crate) const MAX_WEIGHTS: u64 = 1 << 48;
/// Limit on the magnitude of errors, ratios and damping, far above any measurement.
pub(crate) const MAX_NUMBER: f64 = 1e30;
/// Limit on perplexity: a broken model's may be the exponential of its largest logit.
pub(crate) const MAX_PERPLEXITY: f64 = 1e100;
/// Bytes of a linear's name, and linears of a block, with room for 512 experts.
pub(crate) const MAX_NAME: usize = 512;
pub(crate) const MAX_KINDS: usize = 2048;
/// Three centuries.
pub(crate) const MAX_SECONDS: f64 = 1e10;
/// Limit on the entries of short lists.
pub(crate) const MAX_ENTRIES: usize = 1 << 10;
/// Limit on the points of a learning curve.
pub const MAX_CURVE: usize = 64;
/// Limits on the records of clamped states, and on the values in each.
pub(crate) const MAX_CLAMPED: usize = 1 << 16;
pub(crate) const MAX_COUNT: usize = 1 << 47;

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

/// Checks a group size.
pub(crate) fn group(field: &str, size: GroupSize) -> Result<(), String> {
    match size {
        GroupSize::Row => Ok(()),
        GroupSize::Columns(n) => most(field, n, MAX_FEATURES),
    }
}

/// Checks an error, a ratio or a damping.
pub(crate) fn number(field: &str, value: f64) -> Result<(), String> {
    within(field, value, MAX_NUMBER)
}

/// Checks the magnitude of a number.
pub(crate) fn within(field: &str, value: f64, most: f64) -> Result<(), String> {
    match value.abs() <= most {
        true => Ok(()),
        false => Err(format!(
            "{field} = {value:e} is out of range (limit {most:e})"
        )),
    }
}

/// Checks a time.
pub(crate) fn seconds(field: &str, value: f64) -> Result<(), String> {
    match (0.0..=MAX_SECONDS).contains(&value) {
        true => Ok(()),
        false => Err(format!(
            "{field} = {value:e} is not between 0 and {MAX_SECONDS:e}"
        )),
    }
}

/// Checks that a count is at most `limit`.
pub(crate) fn most(field: &str, value: usize, limit: usize) -> Result<(), String> {
    match value <= limit {
        true => Ok(()),
        false => Err(format!("{field}: {value} is over the limit of {limit}")),
    }
}

/// Checks that an index is below `limit`.
pub(crate) fn below(field: &str, value: usize, limit: usize) -> Result<(), String> {
    most(field, value, limit - 1)
}
