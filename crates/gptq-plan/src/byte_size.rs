//! Sizes in messages, in a unit that the command line and recipes accept.

/// Units in descending order; the binary one of each pair first.
const UNITS: [(&str, u128); 8] = [
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("kB", 1_000),
];

/// Formats a size in the unit it was probably given in: the largest in which it has at most two
/// decimals. Other sizes, such as a device's free memory, are rounded to hundredths of a binary
/// unit.
pub fn spelt(bytes: u64) -> String {
    let (name, unit) = unit(bytes);
    let hundredths = (u128::from(bytes) * 100 + unit / 2) / unit;
    number(hundredths, name)
}

/// Formats a size rounded up to hundredths of the unit of `like`.
pub fn at_least(bytes: u64, like: u64) -> String {
    let (name, unit) = unit(like);
    number((u128::from(bytes) * 100).div_ceil(unit), name)
}

fn unit(bytes: u64) -> (&'static str, u128) {
    let bytes = u128::from(bytes);
    let fits = |(_, unit): &&(&str, u128)| *unit <= bytes;
    let exact = |(_, unit): &&(&str, u128)| (bytes * 100).is_multiple_of(*unit);
    let binary = |(name, _): &&(&str, u128)| name.ends_with("iB");
    let found =
        (UNITS.iter().filter(fits).find(exact)).or_else(|| UNITS.iter().filter(fits).find(binary));
    found.copied().unwrap_or((" bytes", 1))
}

fn number(hundredths: u128, unit: &str) -> String {
    let (whole, rest) = (hundredths / 100, hundredths % 100);
    let decimals = format!("{rest:02}");
    match decimals.trim_end_matches('0') {
        "" => format!("{whole}{unit}"),
        decimals => format!("{whole}.{decimals}{unit}"),
    }
}

/// Parses `"4GB"`, `"1.5tb"`, `"512MiB"`, `"1000000"` to whole bytes, in any letter case; the error
/// is a sentence.
pub fn parse_size(text: &str) -> Result<u64, String> {
    size(text)
        .ok_or_else(|| format!("{text:?} is not a size like \"4GB\", \"1.5TB\" or \"512MiB\""))
}

fn size(text: &str) -> Option<u64> {
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    let end = text.find(|c: char| !is_number(c)).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor: u128 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return None,
    };
    // Integer arithmetic, since floats would round large sizes; fractions of a byte are dropped.
    let (whole, decimals) = number.split_once('.').unwrap_or((number, "0"));
    let (whole, tenths) = (whole.parse::<u64>().ok()?, decimals.parse::<u64>().ok()?);
    let ones = 10u128.pow(u32::try_from(decimals.len()).ok().filter(|&n| n <= 18)?);
    let bytes = u128::from(whole) * factor + u128::from(tenths) * factor / ones;
    u64::try_from(bytes).ok().filter(|&bytes| bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_told_as_it_was_given() {
        for text in [
            "120MiB", "1.5GB", "8GiB", "2TB", "64kB", "16KiB", "0.5GiB", "22.25GiB",
        ] {
            let told = spelt(parse_size(text).unwrap());
            assert_eq!(parse_size(&told), parse_size(text), "{text}: {told}");
        }
        assert_eq!(spelt(parse_size("120MiB").unwrap()), "120MiB");
        assert_eq!(spelt(parse_size("1.5GB").unwrap()), "1.5GB");
        assert_eq!(spelt(7), "7 bytes");
        assert_eq!(spelt(85_899_345_921), "80GiB");
        assert_eq!(spelt(140_401_778), "133.9MiB");
    }

    #[test]
    fn what_is_needed_is_in_the_same_unit_and_enough() {
        let budget = parse_size("120MiB").unwrap();
        assert_eq!(at_least(140_401_778, budget), "133.9MiB");
        assert_eq!(
            at_least(140_401_778, parse_size("0.1GB").unwrap()),
            "140.41MB"
        );
        for needed in [1u64, 140_401_778, 140_509_185, u64::MAX / 2] {
            let told = parse_size(&at_least(needed, budget)).unwrap();
            assert!(told >= needed, "{told} for {needed}");
        }
    }
}
