//! Methods of Python's strings, lists and dicts that the library lacks or implements differently.
//! Methods that would change a value are refused, as in Transformers' sandbox.

use std::sync::Arc;

use minijinja::value::{Kwargs, Object, ObjectRepr, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::format;
use super::python::{is_dict, refusal, type_name};
use super::view::View;

/// Methods of dicts that a template may call.
const DICT: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];
/// Methods of dicts that the sandbox hides.
const HIDDEN: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];

/// Returns the attribute names that may be a method instead of a key.
pub(super) fn attributes() -> impl Iterator<Item = &'static str> {
    DICT.into_iter().chain(HIDDEN)
}

/// Evaluates `value.name` without a call: in a dict, a method takes precedence over a key.
pub(super) fn attribute(value: &Value, name: &'static str) -> Result<Value, Error> {
    match is_dict(value) {
        true if HIDDEN.contains(&name) => Ok(Value::UNDEFINED),
        true => Ok(Value::from_object(Bound {
            value: value.clone(),
            name,
        })),
        false => value.get_attr(name),
    }
}

/// A method bound to its value.
#[derive(Debug)]
struct Bound {
    value: Value,
    name: &'static str,
}

impl Object for Bound {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        self.value.call_method(state, self.name, args)
    }
}

/// Calls a method that the library does not know.
pub(super) fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let own = match value.kind() {
        ValueKind::String => text(state, value.as_str().unwrap_or_default(), name, args)?,
        ValueKind::Seq | ValueKind::Iterable => list(value, name, args)?,
        ValueKind::Map if is_dict(value) => dict(value, name, args)?,
        _ => None,
    };
    match own {
        Some(result) => Ok(result),
        None => unknown_method_callback(state, value, name, args),
    }
}

fn dict(value: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let keys = || value.try_iter();
    let view = |name, items: Result<Vec<Value>, Error>| -> Result<Option<Value>, Error> {
        let () = from_args(args)?;
        let items = items?;
        Ok(Some(Value::from_object(View { name, items })))
    };
    match name {
        "keys" => view("dict_keys", keys().map(Iterator::collect)),
        "values" => view(
            "dict_values",
            keys()?.map(|key| value.get_item(&key)).collect(),
        ),
        "items" => {
            let pair = |key: Value| {
                let item = value.get_item(&key)?;
                Ok(Value::from(Tuple::from([key, item])))
            };
            view("dict_items", keys()?.map(pair).collect())
        }
        "copy" => {
            let () = from_args(args)?;
            Ok(Some(value.clone()))
        }
        name if HIDDEN.contains(&name) => Err(unsafe_method(value, name)),
        _ => Ok(None),
    }
}

fn unsafe_method(value: &Value, name: &str) -> Error {
    let kind = type_name(value);
    refusal(format!(
        "{kind}.{name} would change a value, which chat templates may not do"
    ))
}

fn list(value: &Value, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    if value.downcast_object_ref::<View>().is_some() {
        return Ok(None);
    }
    match name {
        "index" => {
            let (what,): (&Value,) = from_args(args)?;
            let place = value.try_iter()?.position(|item| item == *what);
            place
                .map(|place| Some(place.into()))
                .ok_or_else(|| refusal("list.index: the value is not in the list"))
        }
        "count" => {
            let (what,): (&Value,) = from_args(args)?;
            Ok(Some(
                value.try_iter()?.filter(|item| item == what).count().into(),
            ))
        }
        "copy" => {
            let () = from_args(args)?;
            Ok(Some(value.clone()))
        }
        "append" | "clear" | "extend" | "insert" | "pop" | "remove" | "reverse" | "sort" => {
            Err(unsafe_method(value, name))
        }
        _ => Ok(None),
    }
}

/// Returns true for characters that `str.strip` removes without an argument.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn text(
    state: &State<'_, '_>,
    text: &str,
    name: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let pay = |bytes: usize| state.consume_fuel(bytes as u64 / 64);
    Ok(Some(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let drops = |c: char| match chars {
                Some(chars) => chars.contains(c),
                None => is_space(c),
            };
            let mut kept = text;
            if name != "rstrip" {
                kept = kept.trim_start_matches(drops);
            }
            if name != "lstrip" {
                kept = kept.trim_end_matches(drops);
            }
            kept.into()
        }
        "split" | "rsplit" => split(text, name == "rsplit", args)?,
        "splitlines" => {
            let (keep,): (Option<bool>,) = from_args(args)?;
            lines(text, keep.unwrap_or(false))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(refusal("str.partition: an empty separator"));
            }
            let parts = match name {
                "partition" => text.split_once(separator),
                _ => text.rsplit_once(separator),
            };
            let parts = match (parts, name) {
                (Some((before, after)), _) => [before, separator, after],
                (None, "partition") => [text, "", ""],
                (None, _) => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "ljust" | "rjust" | "center" | "zfill" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let missing = width.saturating_sub(text.chars().count());
            let fill = fill.unwrap_or(if name == "zfill" { "0" } else { " " });
            if fill.chars().count() != 1 {
                return Err(refusal(format!(
                    "str.{name}: the fill must be one character"
                )));
            }
            pay(missing)?;
            // Python puts the extra character to the left if the width is odd.
            let left = match name {
                "ljust" => 0,
                "center" => missing / 2 + (missing & width & 1),
                _ => missing,
            };
            let (sign, digits) = match text.strip_prefix(['+', '-']) {
                Some(digits) if name == "zfill" => (&text[..1], digits),
                _ => ("", text),
            };
            let pads = |n: usize| fill.repeat(n);
            format!("{sign}{}{digits}{}", pads(left), pads(missing - left)).into()
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| match c.is_lowercase() {
                true => c.to_uppercase().collect::<String>(),
                false => c.to_lowercase().collect(),
            };
            text.chars().map(swap).collect::<String>().into()
        }
        "casefold" => {
            let () = from_args(args)?;
            text.to_lowercase().replace('ß', "ss").into()
        }
        "title" => {
            let () = from_args(args)?;
            title(text).into()
        }
        "find" | "rfind" | "index" | "rindex" | "count" => find(text, name, args)?,
        "startswith" | "endswith" if args.len() > 1 => {
            let (affix, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
            let part = slice_text(text, start, end).1;
            let has = |affix: &Value| {
                let affix = affix.as_str().unwrap_or_default();
                match name {
                    "startswith" => part.starts_with(affix),
                    _ => part.ends_with(affix),
                }
            };
            match affix.as_str() {
                Some(_) => has(affix),
                None => affix.try_iter()?.any(|affix| has(&affix)),
            }
            .into()
        }
        "isdecimal" => {
            let () = from_args(args)?;
            (!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())).into()
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            let mut joined = super::python::Text::new(state);
            for (i, item) in items.try_iter()?.enumerate() {
                if i > 0 {
                    joined.push(text)?;
                }
                let item_text = item.as_str().ok_or_else(|| {
                    let kind = type_name(&item);
                    refusal(format!("str.join: item {i} is of type {kind}, not a text"))
                })?;
                joined.push(item_text)?;
            }
            joined.finish().into()
        }
        "format" => format::braces(state, text, args)?.into(),
        _ => return Ok(None),
    }))
}

/// Splits a string; keyword arguments are accepted in place of positional ones.
fn split(text: &str, from_right: bool, args: &[Value]) -> Result<Value, Error> {
    let (first, second, keywords): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match first {
        Some(separator) => Some(separator),
        None => keywords.get::<Option<Value>>("sep")?,
    };
    let separator = separator.filter(|separator| !separator.is_none());
    let most = match second {
        Some(most) => Some(most),
        None => keywords.get::<Option<i64>>("maxsplit")?,
    };
    keywords.assert_all_used()?;
    let most = most.and_then(|most| usize::try_from(most).ok());
    let most = most.unwrap_or(usize::MAX - 1);
    let parts: Vec<&str> = match &separator {
        Some(separator) => {
            let separator = separator
                .as_str()
                .filter(|separator| !separator.is_empty())
                .ok_or_else(|| {
                    refusal("str.split: the separator must be a text that is not empty")
                })?;
            match from_right {
                false => text.splitn(most + 1, separator).collect(),
                true => {
                    let mut parts: Vec<&str> = text.rsplitn(most + 1, separator).collect();
                    parts.reverse();
                    parts
                }
            }
        }
        None => words(text, most, from_right),
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Splits at white space, with at most `most` words cut off from one side.
fn words(text: &str, most: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = match from_right {
            false => rest.trim_start_matches(is_space),
            true => rest.trim_end_matches(is_space),
        };
        if rest.is_empty() {
            break;
        }
        if parts.len() == most {
            parts.push(match from_right {
                false => rest,
                true => rest.trim_start_matches(is_space),
            });
            break;
        }
        let (word, left) = match from_right {
            false => {
                let end = rest.find(is_space).unwrap_or(rest.len());
                rest.split_at(end)
            }
            true => {
                let before = rest.trim_end_matches(|c| !is_space(c));
                let (left, word) = rest.split_at(before.len());
                (word, left)
            }
        };
        parts.push(word);
        rest = left;
    }
    // White space alone has no last part either.
    if from_right {
        parts.reverse();
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// Splits into lines at any line ending.
fn lines(text: &str, keep: bool) -> Value {
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut found = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(ends).unwrap_or(rest.len());
        let (line, tail) = rest.split_at(end);
        let length = match tail.strip_prefix("\r\n") {
            Some(_) => 2,
            None => tail.chars().next().map_or(0, char::len_utf8),
        };
        let (ending, after) = tail.split_at(length);
        found.push(match keep {
            true => Value::from(format!("{line}{ending}")),
            false => Value::from(line),
        });
        rest = after;
    }
    Value::from(found)
}

/// Capitalizes every letter that follows a non-letter.
fn title(text: &str) -> String {
    let mut after_letter = false;
    let mut titled = String::with_capacity(text.len());
    for c in text.chars() {
        match after_letter {
            true => titled.extend(c.to_lowercase()),
            false => titled.extend(c.to_uppercase()),
        }
        after_letter = c.is_alphabetic();
    }
    titled
}

/// Returns the part from `start` to `end`, counted in characters and from the end if negative, and
/// the number of characters before it.
fn slice_text(text: &str, start: Option<i64>, end: Option<i64>) -> (usize, &str) {
    let length = text.chars().count();
    let place = |at: i64| match at < 0 {
        true => length.saturating_sub(usize::try_from(at.unsigned_abs()).unwrap_or(length)),
        false => usize::try_from(at).unwrap_or(length).min(length),
    };
    let (start, end) = (start.map_or(0, place), end.map_or(length, place));
    let bytes = |at: usize| {
        text.char_indices()
            .nth(at)
            .map_or(text.len(), |(byte, _)| byte)
    };
    let part = text.get(bytes(start)..bytes(end.max(start)));
    (start, part.unwrap_or_default())
}

fn find(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
    let (before, part) = slice_text(text, start, end);
    if name == "count" {
        return Ok(match what.is_empty() {
            true => part.chars().count() + 1,
            false => part.matches(what).count(),
        }
        .into());
    }
    let place = match name {
        "find" | "index" => part.find(what),
        _ => part.rfind(what),
    };
    match place {
        Some(byte) => {
            let skipped = part.get(..byte).unwrap_or_default().chars().count();
            Ok((before + skipped).into())
        }
        None if name.ends_with("index") => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("str.{name}: the text is not in it"),
        )),
        None => Ok(Value::from(-1)),
    }
}
