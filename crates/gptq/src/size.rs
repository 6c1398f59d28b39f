//! Byte sizes for display: decimal for files, as on the Hub; binary for memory.

use gptq_report::decimal_size;
use indicatif::BinaryBytes;

/// Formats like `"3.90 GB"`.
pub(crate) fn decimal(bytes: u64) -> String {
    decimal_size(bytes)
}

/// Formats like `"5.20 GiB"`.
pub(crate) fn binary(bytes: u64) -> String {
    BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        assert_eq!(decimal(3_900_000_000), "3.90 GB");
        assert_eq!(binary(3 << 29), "1.50 GiB");
        assert_eq!(decimal(12), "12 B");
    }
}
