//! A table of one value of each branch: rows of options by columns of settings.

use std::fmt::Write;

use super::models::Setting;
use super::results::{BranchResults, Loss, ModelResults, RowResults};
use super::rows::Row;

/// A table's columns, and its rows with their titles.
pub(super) struct Table<'a> {
    pub(super) settings: &'static [Setting],
    pub(super) rows: Vec<(&'static str, &'a RowResults)>,
}

/// Returns the rows that were measured.
pub(super) fn measured<'a>(
    rows: &[Row],
    found: &'a ModelResults,
) -> Vec<(&'static str, &'a RowResults)> {
    let rows = rows.iter();
    rows.filter_map(|row| Some((row.title, found.rows.get(row.key)?)))
        .collect()
}

impl Table<'_> {
    /// Formats one value of each branch, and one of each row in a last column.
    pub(super) fn lines(
        &self,
        cell: impl Fn(&BranchResults) -> String,
        last: Option<fn(&RowResults) -> String>,
    ) -> String {
        let names = self.settings.iter().map(|it| it.name);
        let mut cells: Vec<String> = names.map(str::to_owned).collect();
        cells.extend(last.map(|_| "seconds a branch".to_owned()));
        let mut text = format!("| options | {} |\n", cells.join(" | "));
        let _ = writeln!(text, "|{}", "---|".repeat(cells.len() + 1));
        for (title, row) in &self.rows {
            let branches = self.settings.iter().map(|it| row.branches.get(it.name));
            let mut cells: Vec<String> =
                branches.map(|it| it.map_or(String::new(), &cell)).collect();
            cells.extend(last.map(|last| last(row)));
            let _ = writeln!(text, "| {title} | {} |", cells.join(" | "));
        }
        text
    }
}

/// Formats perplexity; `-` if it is not finite.
pub(super) fn perplexity(loss: Loss) -> String {
    match loss.perplexity {
        Some(value) if value < 1000.0 => format!("{value:.3}"),
        Some(value) => format!("{value:.1e}"),
        None => "-".to_owned(),
    }
}

/// Formats KL divergence; `-` if it is not finite.
pub(super) fn kl_divergence(loss: Loss) -> String {
    (loss.kl_divergence).map_or("-".to_owned(), |value| format!("{value:.5}"))
}

/// Formats perplexity, and KL divergence in brackets.
pub(super) fn both(loss: Loss) -> String {
    format!("{} ({})", perplexity(loss), kl_divergence(loss))
}

/// Formats the least and the most seconds of a row's branches.
pub(super) fn seconds(row: &RowResults) -> String {
    let all = || row.branches.values().map(|it| it.seconds);
    let least = format!("{:.1}", all().fold(f64::INFINITY, f64::min));
    let most = format!("{:.1}", all().fold(0.0, f64::max));
    match least == most {
        true => most,
        false => format!("{least} to {most}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ruined_model_is_written_in_powers_of_ten() {
        let show = |value: f64| {
            perplexity(Loss {
                perplexity: Some(value),
                kl_divergence: None,
            })
        };
        assert_eq!([show(13.2514), show(23_456.0)], ["13.251", "2.3e4"]);
        let lost = Loss {
            perplexity: None,
            kl_divergence: None,
        };
        assert_eq!(both(lost), "- (-)");
    }
}
