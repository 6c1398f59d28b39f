//! Byte sizes for display: decimal for files, as on the Hub; binary for memory.

/// Formats like `"3.90 GB"`.
pub(crate) fn decimal(bytes: u64) -> String {
    scaled(bytes, 1000.0, ["B", "kB", "MB", "GB", "TB"])
}

/// Formats like `"5.2 GiB"`.
pub(crate) fn binary(bytes: u64) -> String {
    scaled(bytes, 1024.0, ["B", "KiB", "MiB", "GiB", "TiB"])
}

fn scaled(bytes: u64, step: f64, units: [&str; 5]) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.2} {}", units[unit]),
    }
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
