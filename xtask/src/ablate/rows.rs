//! The rows of the tables: options of a recipe, one run of `gptq quantize` each.

use anyhow::ensure;

use super::models::{Model, Setting};

/// A row.
pub(super) struct Row {
    /// Name on the command line and in the results.
    pub(super) key: &'static str,
    /// Name in the document.
    pub(super) title: &'static str,
    /// Lines of the recipe's `[defaults]`.
    pub(super) options: &'static str,
    pub(super) columns: Columns,
}

/// What the branches of a row differ by.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Columns {
    /// The model's settings.
    Settings,
    /// Settings that a size budget is compared with.
    Sizes,
    /// Size budgets equal to the size of those settings.
    Budgets,
}

/// Rows by which options are compared, in the columns' default order.
pub(super) const OPTIONS: [Row; 8] = [
    row(
        "autogptq",
        "`autogptq`: plain GPTQ",
        "preset = \"autogptq\"",
    ),
    row("standard", "`standard`: searched", "preset = \"standard\""),
    row(
        "standard-refined",
        "`standard`, refined once",
        "preset = \"standard\"\nrefine = 1",
    ),
    row(
        "mismatch",
        "mismatch correction alone",
        "preset = \"autogptq\"\nmismatch_correction = 1.0",
    ),
    row(
        "best-unrefined",
        "`best` without refinement",
        "preset = \"best\"\nrefine = 0",
    ),
    row(
        REFINED,
        "`best`, refined at every width",
        "preset = \"best\"\nrefine = 1",
    ),
    row("best", "`best`", "preset = \"best\""),
    row("tuned", "`tuned`", "preset = \"tuned\""),
];

/// The row of [`OPTIONS`] that orders of columns are compared by: its columns have static act order.
pub(super) const REFINED: &str = "best-refined";

/// Rows with another order of columns than the default.
pub(super) const ORDERS: [Row; 2] = [
    row(
        "best-act-order",
        "act order, scattered groups (`desc_act = true`)",
        "preset = \"best\"\nrefine = 1\ndesc_act = true",
    ),
    row(
        "best-stored-order",
        "stored order (`desc_act = false`)",
        "preset = \"best\"\nrefine = 1\ndesc_act = false",
    ),
];

/// Rows by which size budgets are compared with one setting for all linear layers.
pub(super) const SIZES: [Row; 4] = [
    sized(
        "standard-uniform",
        "`standard`, one setting",
        "preset = \"standard\"",
        Columns::Sizes,
    ),
    sized(
        "standard-budget",
        "`standard`, a budget",
        "preset = \"standard\"",
        Columns::Budgets,
    ),
    sized(
        "best-uniform",
        "`best`, one setting",
        "preset = \"best\"",
        Columns::Sizes,
    ),
    sized(
        "best-budget",
        "`best`, a budget",
        "preset = \"best\"",
        Columns::Budgets,
    ),
];

impl Row {
    /// Returns the columns of this row on `model`; none if the row is not measured on it.
    pub(super) fn settings(&self, model: &Model) -> &'static [Setting] {
        match self.columns {
            Columns::Settings => model.settings,
            Columns::Sizes | Columns::Budgets => model.sizes,
        }
    }
}

/// Returns the rows that `keys` name, or all of them if it is empty.
pub(super) fn chosen(keys: &[String]) -> anyhow::Result<Vec<&'static Row>> {
    let all = || [&OPTIONS[..], &ORDERS, &SIZES].into_iter().flatten();
    let all: Vec<&Row> = all().collect();
    let names: Vec<&str> = all.iter().map(|row| row.key).collect();
    for key in keys {
        ensure!(
            names.contains(&key.as_str()),
            "there is no row {key:?}; the rows are {}",
            names.join(", ")
        );
    }
    let named = |row: &&Row| keys.is_empty() || keys.iter().any(|key| key == row.key);
    Ok(all.into_iter().filter(named).collect())
}

const fn row(key: &'static str, title: &'static str, options: &'static str) -> Row {
    sized(key, title, options, Columns::Settings)
}

const fn sized(
    key: &'static str,
    title: &'static str,
    options: &'static str,
    columns: Columns,
) -> Row {
    Row {
        key,
        title,
        options,
        columns,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_name_and_keep_their_order() {
        let keys = ["best", "autogptq"].map(String::from);
        let rows = chosen(&keys).unwrap();
        let found: Vec<&str> = rows.iter().map(|row| row.key).collect();
        assert_eq!(found, ["autogptq", "best"]);
    }

    #[test]
    fn an_unknown_row_is_refused_with_the_names_of_all() {
        let error = chosen(&["bset".to_owned()]).err().unwrap().to_string();
        assert!(
            error.contains("\"bset\"") && error.contains("best-budget"),
            "{error}"
        );
    }

    #[test]
    fn no_two_rows_share_a_name() {
        let rows = chosen(&[]).unwrap();
        let names: std::collections::BTreeSet<&str> = rows.iter().map(|row| row.key).collect();
        assert_eq!(names.len(), rows.len());
    }
}
