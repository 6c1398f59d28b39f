//! The template library within limits: a template comes with a checkpoint, from anyone.
//!
//! Its work is limited by fuel. What recursion remains is as deep as the template is long or as its
//! values are nested, so it runs on a stack of its own that holds the worst of both. And values stay
//! trees: only an assignment to a namespace could put one inside itself or grow without end, so what
//! is assigned to one is a copy, of limited size.

use std::collections::BTreeMap;
use std::thread;

use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use crate::CalibrationError;

/// Steps after which a template is taken to run forever.
const FUEL: u64 = 10_000_000;

/// Bytes of stack: of address space, taken as they are used. The worst template of the greatest length
/// takes about half, unoptimised.
const STACK: usize = 512 << 20;

/// How deep a value in a namespace may be nested, and how many values it may hold in all.
const MAX_DEPTH: usize = 64;
const MAX_VALUES: usize = 1 << 14;

/// Digits of a number in `str.format`'s text.
const MAX_WIDTH_DIGITS: usize = 4;

/// The filter that copies. A template may use it too, and gains nothing.
const COPY: &str = "gptq_copy";

/// An environment as Transformers has it, with `source` under `name`.
///
/// # Errors
/// What does not parse, with its line.
pub(crate) fn environment(
    name: &'static str,
    source: &str,
) -> Result<Environment<'static>, CalibrationError> {
    on_its_own_stack(|| {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?;
        environment.set_syntax(syntax.clone());
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(method);
        environment.add_function("raise_exception", |message: String| {
            Err::<String, _>(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter(COPY, |value: Value| copy(&value, 0, &mut 0));
        environment.add_template_owned(name, assigning_copies(source, syntax)?)?;
        Ok(environment)
    })
}

/// Python's methods, less what `format` could fill memory with before fuel is counted.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let is_wide = |text: &str| {
        let digits = |byte: &u8| byte.is_ascii_digit();
        text.as_bytes()
            .windows(MAX_WIDTH_DIGITS + 1)
            .any(|run| run.iter().all(digits))
    };
    match name == "format" && value.as_str().is_some_and(is_wide) {
        true => Err(Error::new(
            ErrorKind::InvalidOperation,
            "a width too large in a format",
        )),
        false => unknown_method_callback(state, value, name, args),
    }
}

/// What the library does with a template: its errors by line, its panics (on some malformed format
/// strings, `{a[é`) as one.
pub(crate) fn on_its_own_stack<T: Send>(
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<T, CalibrationError> {
    let refused = |reason: String| CalibrationError::ChatTemplate { line: 0, reason };
    thread::scope(|scope| {
        thread::Builder::new()
            .stack_size(STACK)
            // An error holds values: it is told and dropped there too.
            .spawn_scoped(scope, || work().map_err(told))
            .map_err(|error| refused(format!("no stack of {} MiB: {error}", STACK >> 20)))?
            .join()
            .unwrap_or_else(|_| Err(refused("the template library cannot read it".into())))
    })
}

fn told(error: Error) -> CalibrationError {
    let reason = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    CalibrationError::ChatTemplate {
        line: error.line().unwrap_or(0),
        reason,
    }
}

/// `{% set ns.a = b %}` as `{% set ns.a = (b)|copy %}`, and `{% set ns.a | b %}`, which opens a block,
/// as `{% set ns.a | b|copy %}`. Lines stay where they are.
fn assigning_copies(source: &str, syntax: SyntaxConfig) -> Result<String, Error> {
    let mut written = String::with_capacity(source.len());
    let mut from = 0;
    let mut write_to = |offset: u32, then: &str| {
        let offset = offset as usize;
        written.push_str(source.get(from..offset).unwrap_or_default());
        written.push_str(then);
        from = offset;
    };
    let mut tokens = tokenize(source, false, syntax);
    let mut opens = false;
    while let Some((token, _)) = tokens.next().transpose()? {
        let is_set = opens && matches!(token, Token::Ident("set"));
        opens = matches!(token, Token::BlockStart);
        if !is_set {
            continue;
        }
        let mut dotted = false;
        let mut value = None;
        while let Some((token, span)) = tokens.next().transpose()? {
            match (token, value) {
                (Token::Dot, None) => dotted = true,
                (Token::Pipe, None) => value = Some("|"),
                (Token::Assign, None) => {
                    value = Some(")|");
                    if dotted {
                        write_to(span.end_offset, "(");
                    }
                }
                (Token::BlockEnd, value) => {
                    if let (true, Some(close)) = (dotted, value) {
                        write_to(span.start_offset, close);
                        write_to(span.start_offset, COPY);
                        write_to(span.start_offset, " ");
                    }
                    break;
                }
                _ => {}
            }
        }
    }
    write_to(u32::try_from(source.len()).unwrap_or(u32::MAX), "");
    Ok(written)
}

/// The value with every list and map in it made anew: a namespace becomes the map it is now.
fn copy(value: &Value, depth: usize, values: &mut usize) -> Result<Value, Error> {
    let mut inner = |value: &Value| {
        *values += 1;
        if depth == MAX_DEPTH || *values > MAX_VALUES {
            let limits = format!("over {MAX_DEPTH} deep or {MAX_VALUES} in all");
            let reason = format!("too many values in one of a namespace: {limits}");
            return Err(Error::new(ErrorKind::InvalidOperation, reason));
        }
        copy(value, depth + 1, values)
    };
    Ok(match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Result<Vec<Value>, _> = value.try_iter()?.map(|item| inner(&item)).collect();
            Value::from(items?)
        }
        ValueKind::Map => {
            let pair = |key: Value| Ok((inner(&key)?, inner(&value.get_item(&key)?)?));
            let pairs: Result<BTreeMap<Value, Value>, Error> =
                value.try_iter()?.map(pair).collect();
            Value::from(pairs?)
        }
        _ => value.clone(),
    })
}

#[cfg(test)]
mod tests {
    use minijinja::context;

    use super::*;
    use crate::small_file::MAX_TEMPLATE;

    fn render(source: &str) -> Result<String, CalibrationError> {
        let environment = environment("chat", source)?;
        on_its_own_stack(|| {
            let template = environment.get_template("chat")?;
            template.render(context! { words => ["a", "b"] })
        })
    }

    #[test]
    fn every_form_of_assignment_to_a_namespace_works() {
        let set = |form: &str, shown: &str| {
            let source = format!("{{% set ns = namespace(x=1) %}}{form}{{{{ {shown} }}}}");
            render(&source).unwrap()
        };
        assert_eq!(set("{% set ns.x = 2 %}", "ns.x"), "2");
        assert_eq!(set("  {%- set ns.x=ns.x + 1 -%}  ", "ns.x"), "2");
        assert_eq!(set("{% set ns.x = words, 'é %}' %}", "ns.x[1]"), "é %}");
        assert_eq!(set("{% set ns.x, y = (3, 4) %}", "ns.x * y"), "12");
        assert_eq!(set("{% set ns.x %}text{% endset %}", "ns.x"), "text");
        assert_eq!(set("{% set ns.x | upper %}a{% endset %}", "ns.x"), "A");
        assert_eq!(set("{% set ns.x = {'k': words[1:]} %}", "ns.x.k[0]"), "b");
        assert_eq!(set("{% set ns.x = dict(a=1) %}", "ns.x.a"), "1");
        assert_eq!(
            set("{% raw %}{% set ns.x = 2 %}{% endraw %}", "ns.x"),
            "{% set ns.x = 2 %}1"
        );
        assert_eq!(set("{# {% set ns.x = 2 #}", "ns.x"), "1");
        let error = render("\n\n{% set ns = namespace() %}{% set ns.x = nothing() %}").unwrap_err();
        assert!(error.to_string().contains("line 3"), "{error}");
    }

    #[test]
    fn a_namespace_that_holds_itself_is_a_copy_and_has_an_end() {
        let two = "{% set a = namespace() %}{% set b = namespace() %}";
        for assign in [
            "{% set a.x = b %}{% set b.x = a %}{% set a.x = b %}",
            "{% set a.x = [[a]] %}{% set b.x = [[b]] %}",
            "{% set a.x | default(a, true) %}{% endset %}{% set b.x | default(b, true) %}{% endset %}",
            "{% for i in [a, b] %}{% set a.x = loop %}{% set b.x = loop %}{% endfor %}",
        ] {
            for shown in [
                "a",
                "a == b",
                "a|tojson",
                "[a, b]|sort",
                "a in [b]",
                "a|pprint",
            ] {
                let source = format!("{two}{assign}{{{{ {shown} }}}}");
                render(&source).unwrap();
            }
        }
    }

    #[test]
    fn a_namespace_s_value_that_grows_without_end_is_refused() {
        let grown = |value: &str| {
            let grow =
                format!("{{% for i in range(50000) %}}{{% set ns.a = {value} %}}{{% endfor %}}");
            let source = format!("{{% set ns = namespace(a=[]) %}}{grow}");
            render(&source).unwrap_err().to_string()
        };
        assert!(grown("[ns.a]").contains("64 deep"), "{}", grown("[ns.a]"));
        assert!(grown("[ns.a, ns.a]").contains("in all"));
    }

    #[test]
    fn a_text_far_longer_than_its_template_is_refused() {
        for grown in [
            "{{ 'a' * 1000000000 }}",
            "{{ '%1000000000d'|format(1) }}",
            "{{ '{:1000000000d}'.format(1) }}",
            "{{ ('a' * 1000000).replace('a', 'a' * 100000) }}",
            "{{ ('a' * 1000000)|replace('a', 'a' * 100000) }}",
            "{{ range(100000)|join('a' * 100000) }}",
            "{{ ('a' * 100000).join(range(100000)) }}",
            "{{ [0] * 1000000000 }}",
            "{{ range(1000000000)|list }}",
            "{% set ns = namespace(a='a') %}{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        ] {
            let error = render(grown).unwrap_err().to_string();
            let said = ["out of fuel", "too large", "too many", "width"];
            assert!(said.iter().any(|it| error.contains(it)), "{grown}: {error}");
        }
    }

    #[test]
    fn a_template_nested_as_deep_as_it_is_long_has_the_stack_it_needs() {
        let repeated = |before: &str, again: &str, after: &str| {
            let room = MAX_TEMPLATE as usize - before.len() - after.len();
            format!("{before}{}{after}", again.repeat(room / again.len()))
        };
        for (before, again, after) in [
            ("{{ ", "1+", "1 }}"),
            // Fewer: joining them takes the square of their number, unoptimised a minute.
            ("{{ ", "1~              ", "1 }}"),
            ("{{ a", ".b", " }}"),
            ("{{ a", "()", " }}"),
            ("{{ a", "[1]", " }}"),
            ("{{ a", "|e", " }}"),
            ("{{ a", " is b", " }}"),
            ("{{ ", "-", "1 }}"),
            ("{{ ", "not ", "1 }}"),
            ("{{ ", "a and ", "1 }}"),
            ("{{ ", "1 if a else ", "1 }}"),
            ("{{ ", "(", " }}"),
            ("{% if a %}", "{%elif a%}", "{% endif %}"),
            (
                "{% set a=[] %}",
                "{%set a=[a]%}",
                "{{ a == [a] }}{{ a|tojson }}{{ a }}",
            ),
        ] {
            let _ = render(&repeated(before, again, after));
        }
    }
}
