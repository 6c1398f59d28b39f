//! Plain text tables: the first column left-aligned, the others right-aligned.

use crate::terminal;

/// Formats rows of equal length, the first being the heading.
pub(crate) fn render(rows: &[Vec<String>]) -> String {
    let shown = rows
        .iter()
        .map(|row| row.iter().map(|cell| terminal::line(cell)).collect());
    let rows: &Vec<Vec<String>> = &shown.collect();
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> = (0..columns)
        .map(|c| {
            rows.iter()
                .map(|row| row[c].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(c, (cell, width))| match c {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}
/// Formats a count with its noun: `1 window`, `2 windows`.
pub(crate) fn count(n: usize, thing: &str) -> String {
    match n {
        1 => format!("1 {thing}"),
        _ => format!("{n} {thing}s"),
    }
}
