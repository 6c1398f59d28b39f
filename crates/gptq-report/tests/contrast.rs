//! Contrast of the page's text in both colour schemes: at least 4.5, as WCAG 2.2 asks of small text (level AA).

use std::collections::BTreeMap;

const CSS: &str = include_str!("../templates/report.css");
const PAGE: &str = include_str!("../templates/report.html");

/// Heats above which a cell's text has the colours of `mid` and `hot`.
const THRESHOLDS: [u32; 2] = [49, 67];

/// Red, green and blue, linear, 0 to 1.
type Colour = [f64; 3];

/// Parses `#rgb` or `#rrggbb`.
fn colour(text: &str) -> Colour {
    let digits: Vec<u32> = text[1..].chars().map(|c| c.to_digit(16).unwrap()).collect();
    let bytes: Vec<u32> = match digits.len() {
        3 => digits.iter().map(|d| d * 17).collect(),
        _ => digits
            .chunks(2)
            .map(|pair| pair[0] * 16 + pair[1])
            .collect(),
    };
    let linear = |byte: u32| match f64::from(byte) / 255.0 {
        low if low <= 0.04045 => low / 12.92,
        high => ((high + 0.055) / 1.055).powf(2.4),
    };
    [linear(bytes[0]), linear(bytes[1]), linear(bytes[2])]
}

fn luminance([r, g, b]: Colour) -> f64 {
    0.2126 * r + 0.7152 * g + 0.0722 * b
}

fn contrast(a: Colour, b: Colour) -> f64 {
    let (a, b) = (luminance(a) + 0.05, luminance(b) + 0.05);
    a.max(b) / a.min(b)
}

fn times(matrix: [[f64; 3]; 3], v: [f64; 3]) -> [f64; 3] {
    matrix.map(|row| row.iter().zip(v).map(|(m, x)| m * x).sum())
}

/// Mixes two colours in Oklab, as `color-mix(in oklab, ...)`, with the matrices of CSS Color 4.
fn mixed(from: Colour, to: Colour, share: f64) -> Colour {
    let to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ];
    let from_lms = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ];
    // Oklab is linear in the cube roots, so that these can be mixed in its place.
    let roots = |colour| times(to_lms, colour).map(f64::cbrt);
    let (from, to) = (roots(from), roots(to));
    let at = |i: usize| from[i] + (to[i] - from[i]) * share;
    times(from_lms, [at(0), at(1), at(2)].map(|root| root.powi(3)))
}

/// Returns the colours that the rules named `:root` define, of the light scheme and of the dark one.
fn schemes() -> [BTreeMap<&'static str, Colour>; 2] {
    let dark = CSS.find("@media (prefers-color-scheme: dark)").unwrap();
    let colours = |part: &'static str| {
        let (_, rest) = part.split_once(":root {").unwrap();
        let (rules, _) = rest.split_once('}').unwrap();
        let rules = rules.split(';').filter_map(|rule| rule.split_once(": "));
        let rules = rules.filter(|(_, value)| value.starts_with('#'));
        rules
            .map(|(name, value)| (name.trim(), colour(value)))
            .collect()
    };
    [colours(&CSS[..dark]), colours(&CSS[dark..])]
}

#[test]
fn text_stands_out_from_the_page_and_from_every_shade_of_the_map() {
    let [mid, hot] = THRESHOLDS;
    let rule =
        format!("{{% if c.heat > {hot} %}} class=\"hot\"{{% elif c.heat > {mid} %}} class=\"mid\"");
    assert!(PAGE.contains(&rule), "{rule}");
    for (scheme, colours) in ["light", "dark"].into_iter().zip(schemes()) {
        let of = |name: &str| colours[name];
        for name in ["--text", "--quiet", "--accent"] {
            let found = contrast(of(name), of("--page"));
            assert!(found >= 4.5, "{scheme}: {name} on the page: {found:.2}");
        }
        for heat in 0..=100 {
            let shade = mixed(of("--cold"), of("--hot"), f64::from(heat) / 100.0);
            let name = match heat {
                heat if heat > hot => "--on-hot",
                heat if heat > mid => "--on-mid",
                _ => "--on-cold",
            };
            let found = contrast(of(name), shade);
            assert!(found >= 4.5, "{scheme}: {name} at heat {heat}: {found:.2}");
        }
    }
}
