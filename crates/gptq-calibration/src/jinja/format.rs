//! `"%s" % value` and `"{}".format(value)`. The library formats numbers, one conversion at a time;
//! strings are formatted as in Python.

use std::ops::RangeFrom;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::ValueKind;
use minijinja::{Error, State, Value};

use super::python::{Text, is_dict, refusal, str_of, type_name};

/// Maximum width or precision of a conversion.
const MAX_WIDTH: usize = 9999;

/// `text % value`.
pub(super) fn percent(state: &State<'_, '_>, text: &str, value: &Value) -> Result<String, Error> {
    let values: Vec<Value> = match value.is_tuple() {
        true => value.try_iter()?.collect(),
        false => vec![value.clone()],
    };
    let mut values = values.iter();
    let mut next = || {
        values
            .next()
            .ok_or_else(|| refusal("not enough arguments for format string"))
    };
    let mut written = Text::new(state);
    let mut by_name = false;
    let mut rest = text;
    while let Some((literal, conversion)) = rest.split_once('%') {
        written.push(literal)?;
        let mut chars = conversion.chars().peekable();
        let mut taken = 0;
        let named = match chars.peek() {
            Some('(') => {
                let (name, _) = conversion[1..]
                    .split_once(')')
                    .ok_or_else(|| refusal("incomplete format key"))?;
                taken = name.len() + 2;
                chars = conversion[taken..].chars().peekable();
                Some(name)
            }
            _ => None,
        };
        let mut spec = String::from("%");
        let (mut left, mut stars) = (false, Vec::new());
        let kind = loop {
            let c = chars.next().ok_or_else(|| refusal("incomplete format"))?;
            taken += c.len_utf8();
            match c {
                '-' => {
                    left = true;
                    spec.push(c);
                }
                '#' | '+' | ' ' | '.' | '0'..='9' => spec.push(c),
                '*' => {
                    let width = i64::try_from(next()?.clone())?;
                    stars.push(width);
                    spec += &width.to_string();
                }
                'h' | 'l' | 'L' => {}
                kind => break kind,
            }
        };
        rest = &conversion[taken..];
        if kind == '%' {
            written.push("%")?;
            continue;
        }
        let item = match named {
            Some(name) if is_dict(value) => {
                by_name = true;
                let item = value.get_item(&Value::from(name))?;
                match item.is_undefined() {
                    true => return Err(refusal(format!("format: no key {name:?}"))),
                    false => item,
                }
            }
            Some(_) => return Err(refusal("format requires a mapping")),
            None => next()?.clone(),
        };
        let (width, precision) = sizes(&spec)?;
        state.consume_fuel((width + precision.unwrap_or(0)) as u64 / 64)?;
        match kind {
            's' | 'r' | 'a' => {
                let mut shown = Text::new(state);
                match kind {
                    's' => shown.push_str(&item)?,
                    _ => shown.push_repr(&item)?,
                }
                let shown = shown.finish();
                let shown: String = match precision {
                    Some(most) => shown.chars().take(most).collect(),
                    None => shown,
                };
                let pad = " ".repeat(width.saturating_sub(shown.chars().count()));
                let (before, after) = if left { ("", &*pad) } else { (&*pad, "") };
                written.push(before)?;
                written.push(&shown)?;
                written.push(after)?;
            }
            'd' | 'i' | 'u' if !is_number(&item) => {
                let found = type_name(&item);
                return Err(refusal(format!(
                    "%{kind} format: a real number is required, not {found}"
                )));
            }
            'd' | 'i' | 'u' | 'o' | 'x' | 'X' | 'e' | 'E' | 'f' | 'F' | 'g' | 'G' | 'c' => {
                // The library does not know the obsolete `u`.
                spec.push(if kind == 'u' { 'd' } else { kind });
                written.push(&format(FormatStyle::Printf, &spec, &[item])?)?;
            }
            other => return Err(refusal(format!("unsupported format character {other:?}"))),
        }
    }
    written.push(rest)?;
    if values.next().is_some() && !by_name && !is_dict(value) {
        return Err(refusal(
            "not all arguments converted during string formatting",
        ));
    }
    Ok(written.finish())
}

fn is_number(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
}

/// Parses the width and precision of a conversion.
fn sizes(spec: &str) -> Result<(usize, Option<usize>), Error> {
    let spec = spec.trim_start_matches(['%', '-', '#', '+', ' ', '0']);
    let size = |digits: &str| match digits {
        "" => Ok(0),
        digits => digits
            .parse()
            .ok()
            .filter(|size| *size <= MAX_WIDTH)
            .ok_or_else(|| refusal("a width too large in a format")),
    };
    match spec.split_once('.') {
        Some((width, precision)) => Ok((size(width)?, Some(size(precision)?))),
        None => Ok((size(spec)?, None)),
    }
}

/// `text.format(..)`: fields by position or name, followed by attributes and items.
pub(super) fn braces(state: &State<'_, '_>, text: &str, args: &[Value]) -> Result<String, Error> {
    let (keywords, args) = match args.split_last() {
        Some((last, args)) if last.is_kwargs() => (Some(last), args),
        _ => (None, args),
    };
    let mut written = Text::new(state);
    let mut following = 0..;
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        let (literal, from) = rest.split_at(at);
        written.push(literal)?;
        if let Some(after) = from.strip_prefix("{{").or_else(|| from.strip_prefix("}}")) {
            written.push(from.get(..1).unwrap_or_default())?;
            rest = after;
            continue;
        }
        let field = from.strip_prefix('{');
        let field = field.and_then(|field| field.split_once('}'));
        let (field, after) = field.ok_or_else(|| refusal("a single brace in a format string"))?;
        rest = after;
        let (field, spec) = field.split_once(':').unwrap_or((field, ""));
        let (name, conversion) = match field.split_once('!') {
            Some((name, conversion)) => (name, conversion),
            None => (field, ""),
        };
        let value = field_value(name, &mut following, args, keywords)?;
        let shown = match conversion {
            "r" | "a" => {
                let mut shown = Text::new(state);
                shown.push_repr(&value)?;
                shown.finish().into()
            }
            "s" => str_of(state, &value)?.into(),
            "" if spec.is_empty() => str_of(state, &value)?.into(),
            "" => value,
            other => {
                return Err(refusal(format!(
                    "an unknown conversion {other:?} in a format"
                )));
            }
        };
        match spec {
            "" => written.push(shown.as_str().unwrap_or_default())?,
            spec => {
                let is_wide = |run: &str| run.len() > MAX_WIDTH.ilog10() as usize + 1;
                if spec.split(|c: char| !c.is_ascii_digit()).any(is_wide) {
                    return Err(refusal("a width too large in a format"));
                }
                let spec = format!("{{0:{spec}}}");
                written.push(&format(FormatStyle::StrFormat, &spec, &[shown])?)?;
            }
        }
    }
    written.push(rest)?;
    Ok(written.finish())
}

/// Returns the value of a field such as `0`, `name`, `0[key]` or `name.key`.
fn field_value(
    name: &str,
    following: &mut RangeFrom<usize>,
    args: &[Value],
    keywords: Option<&Value>,
) -> Result<Value, Error> {
    let first = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut path) = name.split_at(first);
    let place = match first {
        "" => following.next(),
        first => first.parse().ok(),
    };
    let value = match place {
        Some(place) => args.get(place).cloned(),
        None => keywords.and_then(|keywords| keywords.get_attr(first).ok()),
    };
    let missing = || refusal(format!("a format uses {name:?}, which was not given"));
    let mut value = value
        .filter(|value| !value.is_undefined())
        .ok_or_else(missing)?;
    while !path.is_empty() {
        let (key, after) = match path.strip_prefix('[') {
            Some(item) => item.split_once(']').ok_or_else(missing)?,
            None => {
                let attribute = path.get(1..).unwrap_or_default();
                attribute.split_at(attribute.find(['.', '[']).unwrap_or(attribute.len()))
            }
        };
        value = match key.parse::<usize>() {
            Ok(index) => value.get_item_by_index(index)?,
            Err(_) => value.get_attr(key)?,
        };
        path = after;
    }
    Ok(value)
}
