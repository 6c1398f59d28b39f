//! Sizes in messages: in the unit they were given in, as the command line and recipes take them back.

/// From the largest down; of two that are alike, the binary one first.
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

/// A size in the unit that it was given in: the largest one in which it has at most two decimals. What is in
/// none, such as a device's free memory, is to the nearest hundredth of a binary one.
pub(crate) fn spelt(bytes: u64) -> String {
    let (name, unit) = unit(bytes);
    let hundredths = (u128::from(bytes) * 100 + unit / 2) / unit;
    number(hundredths, name)
}

/// A size rounded up to hundredths of the unit that `like` was given in.
pub(crate) fn at_least(bytes: u64, like: u64) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse_size;

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
