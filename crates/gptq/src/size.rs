//! Bytes for people: decimal for files, as the Hub shows them; binary for memory.

/// `"3.90 GB"`.
pub(crate) fn decimal(bytes: u64) -> String {
    scaled(bytes, 1000.0, ["B", "kB", "MB", "GB", "TB"])
}

/// `"5.2 GiB"`.
pub(crate) fn binary(bytes: u64) -> String {
    scaled(bytes, 1024.0, ["B", "KiB", "MiB", "GiB", "TiB"])
}

/// Bytes from `"22GiB"`, `"512 MB"` or a plain number.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(end.unwrap_or(text.len()));
    let factor = match unit.trim() {
        "" | "B" => 1.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        unit => return Err(format!("{unit:?} is no unit; write B, MB, GB, MiB or GiB")),
    };
    match number.parse::<f64>() {
        Ok(number) => Ok((number * factor) as u64),
        Err(_) => Err(format!("{text:?} is no size; write one such as 22GiB")),
    }
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

    #[test]
    fn sizes_parse_with_and_without_units() {
        assert_eq!(parse("22GiB"), Ok(22 << 30));
        assert_eq!(parse("1.5 GB"), Ok(1_500_000_000));
        assert_eq!(parse("4096"), Ok(4096));
        for text in ["", "GiB", "3 Gb", "-1GB", "1.2.3"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
