//! Rust sources taken apart by their lines, as `rustfmt` lays them out: imports, types and `impl` blocks
//! without comments and tests.

/// A source taken apart.
#[derive(Default)]
pub(crate) struct Plain {
    /// Neither comments nor tests nor re-exports.
    pub(crate) text: String,
    /// The re-exports.
    pub(crate) exports: String,
    /// Test modules that are files of their own.
    pub(crate) test_modules: Vec<String>,
}

impl Plain {
    /// Takes `source` apart.
    pub(crate) fn new(source: &str) -> Plain {
        let mut plain = Plain::default();
        let indent = |line: &str| line.len() - line.trim_start().len();
        let mut lines = source.lines();
        while let Some(line) = lines.next() {
            let code = line.trim_start();
            if code.starts_with("#[cfg(test)]") || code.starts_with("#[cfg(all(test") {
                for item in lines.by_ref() {
                    let module = item.trim_end_matches(';').rsplit_once("mod ");
                    plain
                        .test_modules
                        .extend(module.map(|(_, name)| name.to_owned()));
                    let ends = [';', '}', ','].iter().any(|end| item.ends_with(*end));
                    if indent(item) <= indent(line) && ends {
                        break;
                    }
                }
            } else if code.starts_with("pub") && code.contains("use ") {
                let rest = std::iter::once(line).chain(lines.by_ref());
                for line in rest {
                    plain.exports.push_str(line);
                    plain.exports.push('\n');
                    if line.ends_with(';') {
                        break;
                    }
                }
            } else if !code.starts_with("//") {
                plain.text.push_str(line);
                plain.text.push('\n');
            }
        }
        plain
    }
}

/// Returns the names of the types that `text` defines.
pub(crate) fn types(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let code = line.trim_start();
        let code = match code.strip_prefix("pub") {
            Some(rest) => rest.split_once(' ')?.1,
            None => code,
        };
        let (kind, rest) = code.split_once(' ')?;
        // An indented `type` belongs to a trait.
        let is_type =
            ["struct", "enum", "trait"].contains(&kind) || kind == "type" && !line.starts_with(' ');
        is_type.then(|| word(rest).0)
    })
}

/// Returns the names of the types that have an inherent `impl` in `text`.
pub(crate) fn implemented(text: &str) -> impl Iterator<Item = &str> {
    text.split("\nimpl").skip(1).filter_map(|rest| {
        let header = rest.split('{').next()?;
        let mut depth = 0;
        // Skips the generic parameters, of which `->` in a bound closes none.
        let start = header.replace("->", "  ").find(|c| {
            depth += i32::from(c == '<') - i32::from(c == '>');
            c == ' ' && depth == 0
        });
        let header = header[start?..].trim_start();
        (!header.contains(" for ")).then(|| word(header).0)
    })
}

/// Splits off the identifier at the start.
fn word(text: &str) -> (&str, &str) {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    text.split_at(text.find(|c| !is_part(c)).unwrap_or(text.len()))
}

/// Returns the paths in `text` whose first segment is one of `heads`, use trees taken apart.
pub(crate) fn paths(text: &str, heads: impl Fn(&str) -> bool) -> Vec<Vec<&str>> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices("::") {
        let is_part = |c: char| c.is_alphanumeric() || c == '_';
        let head = text[..at].rsplit(|c| !is_part(c)).next().unwrap_or("");
        let before = &text[..at - head.len()];
        if heads(head) && !before.ends_with("::") && !before.ends_with("(in ") {
            tree(&text[at + 2..], &[head], &mut found);
        }
    }
    found
}

/// Adds every path of the use tree at the start of `text` below `prefix`, and returns the rest.
fn tree<'a>(text: &'a str, prefix: &[&'a str], found: &mut Vec<Vec<&'a str>>) -> &'a str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        while !rest.is_empty() && !rest.starts_with('}') {
            rest = tree(rest, prefix, found);
            let end = rest.find([',', '}']).unwrap_or(rest.len());
            rest = rest[end..].trim_start_matches(',').trim_start();
        }
        return rest.strip_prefix('}').unwrap_or(rest);
    }
    let (segment, rest) = word(text);
    let mut path = prefix.to_vec();
    path.extend(Some(segment).filter(|it| !it.is_empty()));
    match rest.strip_prefix("::") {
        Some(below) if !below.starts_with('<') => tree(below, &path, found),
        _ => {
            found.push(path);
            rest
        }
    }
}
