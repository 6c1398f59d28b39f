//! Filters, tests and functions of Jinja that the library lacks or implements differently.

use std::sync::Arc;

use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, State, Value, functions};
use minijinja_contrib::{filters, globals};

use super::python::{Text, is_dict, refusal, str_of, type_name};
use super::view::View;
use super::{format, json};

/// Adds them all.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", json::tojson);
    environment.add_filter("string", string);
    environment.add_filter("join", join);
    environment.add_filter("format", printf);
    for name in ["e", "escape"] {
        environment.add_filter(name, |state: &State<'_, '_>, value: &Value| {
            match value.is_safe() {
                true => Ok(value.clone()),
                false => escape(state, value),
            }
        });
    }
    environment.add_filter("forceescape", escape);
    for (name, method) in [
        ("trim", "strip"),
        ("upper", "upper"),
        ("lower", "lower"),
        ("capitalize", "capitalize"),
        ("replace", "replace"),
    ] {
        environment.add_filter(name, by_method(method));
    }
    environment.add_filter("title", |state: &State<'_, '_>, value: &Value| {
        let text = str_of(state, value)?;
        Ok::<_, Error>(minijinja::filters::title(text.into()))
    });
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("truncate", truncate);
    environment.add_filter("center", center);
    environment.add_filter("wordcount", filters::wordcount);
    environment.add_filter("striptags", filters::striptags);
    environment.add_filter("filesizeformat", filters::filesizeformat);

    environment.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::String | ValueKind::Seq | ValueKind::Undefined => true,
        ValueKind::Iterable => value.downcast_object_ref::<View>().is_none(),
        ValueKind::Map => is_dict(value),
        _ => false,
    });
    environment.add_test("iterable", |value: &Value| match value.kind() {
        ValueKind::String | ValueKind::Seq | ValueKind::Iterable | ValueKind::Undefined => true,
        ValueKind::Map => is_dict(value),
        _ => false,
    });
    environment.add_test("mapping", is_dict);
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    environment.add_test("callable", |value: &Value| match value.kind() {
        ValueKind::Plain | ValueKind::Undefined => true,
        ValueKind::Map => !is_dict(value) && value.to_string().starts_with("<macro"),
        _ => false,
    });

    environment.add_function(
        "raise_exception",
        |state: &State<'_, '_>, message: &Value| Err::<Value, _>(refusal(str_of(state, message)?)),
    );
    environment.add_function("namespace", namespace);
    environment.add_global("dict", Value::from_object(Dict));
    environment.add_function("cycler", |Rest(items): Rest<Value>| globals::cycler(items));
    environment.add_function("joiner", globals::joiner);
}

fn string(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.clone()),
        _ => str_of(state, value).map(Value::from),
    }
}

/// Adds a filter that is a method of the value as a string.
fn by_method(
    method: &'static str,
) -> impl Fn(&mut State<'_, '_>, &Value, Rest<Value>) -> Result<Value, Error> + Send + Sync + 'static
{
    move |state, value, Rest(args)| {
        let text = Value::from(str_of(state, value)?);
        text.call_method(state, method, &args)
    }
}

/// `join(value, d="", attribute=None)`.
fn join(
    state: &mut State<'_, '_>,
    value: &Value,
    separator: Option<Value>,
    attribute: Option<Value>,
    keywords: Kwargs,
) -> Result<Value, Error> {
    let or_keyword = |value: Option<Value>, name| match value {
        Some(value) => Ok(Some(value)),
        None => keywords.get::<Option<Value>>(name),
    };
    let separator = or_keyword(separator, "d")?;
    let attribute = or_keyword(attribute, "attribute")?.filter(|attribute| !attribute.is_none());
    keywords.assert_all_used()?;
    let value = match attribute {
        Some(attribute) => {
            let by: Kwargs = [("attribute", attribute)].into_iter().collect();
            state.apply_filter("map", &[value.clone(), by.into()])?
        }
        None => value.clone(),
    };
    let separator = match separator {
        Some(separator) => str_of(state, &separator)?,
        None => String::new(),
    };
    let mut text = Text::new(state);
    for (i, item) in value.try_iter()?.enumerate() {
        if i > 0 {
            text.push(&separator)?;
        }
        text.push_str(&item)?;
    }
    Ok(text.finish().into())
}

/// `format(value, *args, **kwargs)`, printf style.
fn printf(
    state: &State<'_, '_>,
    text: &Value,
    Rest(args): Rest<ValueOrKwargs>,
) -> Result<String, Error> {
    let args: Vec<Value> = args.into_iter().map(ValueOrKwargs::into_value).collect();
    let text = str_of(state, text)?;
    match args.as_slice() {
        [only] if only.is_kwargs() => {
            let pairs = only
                .try_iter()?
                .map(|key| Ok((key.clone(), only.get_item(&key)?)));
            let pairs = pairs.collect::<Result<Vec<(Value, Value)>, Error>>()?;
            format::percent(state, &text, &Value::from_pairs(pairs))
        }
        _ => {
            let tuple = minijinja::value::Tuple::from(args);
            format::percent(state, &text, &Value::from(tuple))
        }
    }
}

/// Escapes like markupsafe.
fn escape(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    let plain = str_of(state, value)?;
    let mut text = Text::new(state);
    let mut buffer = [0; 4];
    for c in plain.chars() {
        text.push(match c {
            '&' => "&amp;",
            '<' => "&lt;",
            '>' => "&gt;",
            '\'' => "&#39;",
            '"' => "&#34;",
            c => c.encode_utf8(&mut buffer),
        })?;
    }
    Ok(Value::from_safe_string(text.finish()))
}

/// The library's filter, with Jinja's default for values that are not numbers.
fn int(
    state: &mut State<'_, '_>,
    value: &Value,
    Rest(args): Rest<ValueOrKwargs>,
) -> Result<Value, Error> {
    let args: Vec<Value> = args.into_iter().map(ValueOrKwargs::into_value).collect();
    let mut values = vec![value.clone()];
    values.extend(args.iter().cloned());
    let default = match args.first() {
        Some(first) if first.is_kwargs() => first.get_attr("default")?,
        Some(first) => first.clone(),
        None => Value::UNDEFINED,
    };
    let default = match default.is_undefined() {
        true => Value::from(0),
        false => default,
    };
    Ok(state
        .apply_filter("library_int", &values)
        .unwrap_or(default))
}

/// The library's filter, with Jinja's default for values that are not numbers.
fn float(
    state: &mut State<'_, '_>,
    value: &Value,
    default: Option<Value>,
    keywords: Kwargs,
) -> Result<Value, Error> {
    let default = match default {
        Some(default) => default,
        None => keywords
            .get::<Option<Value>>("default")?
            .unwrap_or_else(|| Value::from(0.0)),
    };
    keywords.assert_all_used()?;
    Ok(state
        .apply_filter("library_float", &[value.clone(), default.clone()])
        .unwrap_or(default))
}

/// `truncate(s, length=255, killwords=False, end="...", leeway=5)`.
fn truncate(
    state: &mut State<'_, '_>,
    value: &Value,
    args: Rest<Value>,
    keywords: Kwargs,
) -> Result<Value, Error> {
    let argument = |i: usize, name: &str, default: Value| match args.get(i) {
        Some(value) => Ok(value.clone()),
        None => Ok::<_, Error>(keywords.get::<Option<Value>>(name)?.unwrap_or(default)),
    };
    let length = usize::try_from(argument(0, "length", 255.into())?)?;
    let kill = argument(1, "killwords", false.into())?.is_true();
    let end = str_of(state, &argument(2, "end", "...".into())?)?;
    let leeway = usize::try_from(argument(3, "leeway", 5.into())?)?;
    keywords.assert_all_used()?;
    let text = str_of(state, value)?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.into());
    }
    let kept = length
        .checked_sub(end.chars().count())
        .ok_or_else(|| refusal("truncate: end is longer than length"))?;
    let kept: String = text.chars().take(kept).collect();
    let kept = match kill {
        true => kept.as_str(),
        false => kept
            .rsplit_once(' ')
            .map_or(kept.as_str(), |(words, _)| words),
    };
    Ok(format!("{kept}{end}").into())
}

fn center(state: &mut State<'_, '_>, value: &Value, width: Option<usize>) -> Result<Value, Error> {
    let text = Value::from(str_of(state, value)?);
    text.call_method(state, "center", &[width.unwrap_or(80).into()])
}

/// The library's namespace, without the names that Transformers refuses.
fn namespace(Rest(values): Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let mut pairs: Vec<(Value, Value)> = Vec::new();
    for values in values.into_iter().map(ValueOrKwargs::into_value) {
        pairs.extend(pairs_of(&values)?);
    }
    if pairs
        .iter()
        .any(|(name, _)| name.as_str().is_some_and(|name| name.starts_with('_')))
    {
        return Err(refusal(
            "a chat template cannot store an attribute of a namespace that begins with an underscore",
        ));
    }
    let values = Value::from_pairs(pairs);
    functions::namespace(Some(
        minijinja::value::from_args::<(ValueOrKwargs,)>(&[values])?.0,
    ))
}

/// Returns the pairs of a dict, of keyword arguments or of a list of pairs.
fn pairs_of(value: &Value) -> Result<Vec<(Value, Value)>, Error> {
    let is_map = value.kind() == ValueKind::Map;
    if !is_map && !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        let kind = type_name(value);
        return Err(refusal(format!(
            "cannot make a dict from a value of type {kind}"
        )));
    }
    let pair = |item: Value| match is_map {
        true => Ok((item.clone(), value.get_item(&item)?)),
        false => match item.try_iter()?.collect::<Vec<_>>().as_slice() {
            [key, value] => Ok((key.clone(), value.clone())),
            _ => Err(refusal("a dict needs pairs")),
        },
    };
    value.try_iter()?.map(pair).collect()
}

/// The function `dict`.
#[derive(Debug)]
struct Dict;

impl Object for Dict {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        let mut pairs = Vec::new();
        for values in args {
            pairs.extend(pairs_of(values)?);
        }
        Ok(Value::from_pairs(pairs))
    }

    fn call_method(
        self: &Arc<Self>,
        _: &mut State<'_, '_>,
        name: &str,
        args: &[Value],
    ) -> Result<Value, Error> {
        if name != "fromkeys" {
            return Err(refusal(format!("dict has no method {name}")));
        }
        let (keys, value): (&Value, Option<Value>) = minijinja::value::from_args(args)?;
        let value = value.unwrap_or_else(|| Value::from(()));
        Ok(Value::from_pairs(
            keys.try_iter()?.map(|key| (key, value.clone())),
        ))
    }
}
