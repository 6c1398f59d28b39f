//! Number formats shared by the page, its tables and the card.

use indicatif::DecimalBytes;

/// Formats bytes in decimal units, as the Hub does: `"3.90 GB"`.
pub fn decimal_size(bytes: u64) -> String {
    DecimalBytes(bytes).to_string()
}

/// Formats a relative error in a table: `"3.667e-3"`.
pub(crate) fn error(value: f64) -> String {
    format!("{value:.3e}")
}

/// Formats a relative error in a cell of a heat map: `"3.7e-3"`.
pub(crate) fn short_error(value: f64) -> String {
    format!("{value:.1e}")
}

/// Formats the increase of a perplexity over the dense model's: `"+0.96 %"`.
pub(crate) fn over(value: f64, dense: f64) -> String {
    format!("{:+.2} %", 100.0 * (value / dense - 1.0))
}

/// Formats seconds: `"0.42 s"`, `"3 min 20 s"`.
pub(crate) fn seconds(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.2} s"),
        v if v < 120.0 => format!("{v:.1} s"),
        v => format!("{} min {:02} s", v as u64 / 60, v as u64 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_people_write_them() {
        assert_eq!(decimal_size(3_900_000_000), "3.90 GB");
        assert_eq!(decimal_size(12), "12 B");
        assert_eq!(decimal_size(1_234), "1.23 kB");
        assert_eq!(error(0.003_667), "3.667e-3");
        assert_eq!(over(20.5, 20.0), "+2.50 %");
        assert_eq!(seconds(9.876), "9.88 s");
        assert_eq!(seconds(200.9), "3 min 20 s");
    }
}
