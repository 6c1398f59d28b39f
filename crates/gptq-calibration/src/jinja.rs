//! The template library with limits, since templates come with checkpoints from anyone.
//!
//! Fuel limits the work. The remaining recursion is as deep as the template is long or its values
//! are nested, so rendering runs on a separate stack that holds the worst case of both. Values stay
//! trees: only an assignment to a namespace could put a value inside itself or let it grow without
//! end, so the assigned value is copied, with a size limit.

mod date;
mod filters;
mod format;
mod json;
mod methods;
mod operators;
mod python;
mod source;
mod view;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use minijinja::machinery::{eval, get_compiled_template, make_string_output};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};

pub use self::date::{is_date, now};
use self::python::{Text, refusal};
use self::source::{COPY, GENERATION, PLAIN};

/// Steps after which a template counts as endless.
const FUEL: u64 = 10_000_000;

/// Stack size in bytes of address space, committed as used. The worst template of the maximum
/// length uses about half of it, unoptimized.
const STACK: usize = 512 << 20;

/// Maximum nesting depth and number of values in a namespace entry.
const MAX_DEPTH: usize = 64;
const MAX_VALUES: usize = 1 << 14;

/// Name of the only template in an environment.
const NAME: &str = "chat";

/// A compiled template in an environment like that of Transformers.
#[derive(Debug)]
pub(crate) struct Jinja {
    environment: Environment<'static>,
    /// True if a rendering asked for the date.
    dated: Arc<AtomicBool>,
}

impl Jinja {
    /// Compiles a template.
    ///
    /// # Errors
    /// A template that does not parse, with its line.
    pub(crate) fn new(source: &str) -> Result<Self, Objection> {
        on_its_own_stack(|| {
            let mut environment = Environment::new();
            let syntax = SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()?;
            environment.set_syntax(syntax.clone());
            environment.set_fuel(Some(FUEL));
            environment.set_unknown_method_callback(methods::method);
            environment.set_formatter(|out, state, value| {
                let escaped = match (state.auto_escape(), value.is_safe()) {
                    (AutoEscape::None, _) | (_, true) => None,
                    _ => Some(state.apply_filter("e", std::slice::from_ref(value))?),
                };
                let mut text = Text::new(state);
                text.push_str(escaped.as_ref().unwrap_or(value))?;
                let written = out.write_str(&text.finish());
                written.map_err(|error| {
                    Error::new(ErrorKind::WriteFailure, "no output").with_source(error)
                })
            });
            // Keeps the library's versions available to the filters that replace them.
            environment.add_filter("library_int", minijinja::filters::int);
            environment.add_filter("library_float", minijinja::filters::float);
            filters::add_to(&mut environment);
            operators::add_to(&mut environment);
            let dated = Arc::new(AtomicBool::new(false));
            date::add_to(&mut environment, dated.clone());
            environment.add_filter(COPY, |value: Value| copy(&value, 0, &mut 0));
            environment.add_filter(PLAIN, |value: Value| value);
            environment.add_function(
                GENERATION,
                |state: &mut minijinja::State<'_, '_>, body: Kwargs| {
                    let caller: Value = body.get("caller")?;
                    caller.call(state, &[])
                },
            );
            environment.add_template_owned(NAME, source::exchanged(source, syntax)?)?;
            Ok(Jinja { environment, dated })
        })
    }

    /// Renders the template with `values`, on the date `now`.
    ///
    /// # Errors
    /// Errors raised by the template or during rendering, with the line.
    pub(crate) fn render(
        &self,
        values: BTreeMap<&'static str, Value>,
        now: &str,
    ) -> Result<String, Objection> {
        on_its_own_stack(|| {
            let template = self.environment.get_template(NAME)?;
            let compiled = get_compiled_template(&template);
            let (program, blocks) = operators::exchange(compiled);
            let values = values.into_iter().chain([(date::NOW, Value::from(now))]);
            let values = Value::from_pairs(values);
            let mut text = String::new();
            let mut out = make_string_output(&mut text);
            let escape = compiled.initial_auto_escape.clone();
            eval(
                &self.environment,
                &program,
                values,
                &blocks,
                &mut out,
                escape,
            )?;
            Ok(text)
        })
    }

    /// Returns true if a rendering asked for the date since the last call.
    pub(crate) fn asked_for_date(&self) -> bool {
        self.dated.swap(false, Ordering::Relaxed)
    }
}

/// Error of a template or of the library.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Objection {
    /// Line of the template, from 1; 0 if unknown.
    pub line: usize,
    /// Message.
    pub reason: String,
}

/// Runs `work` on a separate stack. Errors are converted with their line, and panics (on some
/// malformed format strings, `{a[é`) become an error.
fn on_its_own_stack<T: Send>(
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> Result<T, Objection> {
    let refused = |reason: String| Objection { line: 0, reason };
    thread::scope(|scope| {
        thread::Builder::new()
            .stack_size(STACK)
            // An error holds values, so it is converted and dropped on that stack too.
            .spawn_scoped(scope, || work().map_err(told))
            .map_err(|error| refused(format!("no stack of {} MiB: {error}", STACK >> 20)))?
            .join()
            .unwrap_or_else(|_| Err(refused("the template library cannot read it".into())))
    })
}

fn told(error: Error) -> Objection {
    let reason = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    Objection {
        line: error.line().unwrap_or(0),
        reason: reason.replace('\n', " "),
    }
}

/// Copies the value with every list and map in it; a namespace becomes a map with its current
/// entries.
fn copy(value: &Value, depth: usize, values: &mut usize) -> Result<Value, Error> {
    let mut inner = |value: &Value| {
        *values += 1;
        if depth == MAX_DEPTH || *values > MAX_VALUES {
            let limits = format!("over {MAX_DEPTH} deep or {MAX_VALUES} in all");
            let reason = format!("too many values in a namespace entry: {limits}");
            return Err(refusal(reason));
        }
        copy(value, depth + 1, values)
    };
    Ok(match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Result<Vec<Value>, _> = value.try_iter()?.map(|item| inner(&item)).collect();
            match value.is_tuple() {
                true => Value::from(Tuple::from(items?)),
                false => Value::from(items?),
            }
        }
        ValueKind::Map => {
            let pair = |key: Value| Ok((inner(&key)?, inner(&value.get_item(&key)?)?));
            let pairs: Result<Vec<(Value, Value)>, Error> = value.try_iter()?.map(pair).collect();
            Value::from_pairs(pairs?)
        }
        _ => value.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::small_file::MAX_TEMPLATE;

    fn render(source: &str) -> Result<String, String> {
        let words = BTreeMap::from([("words", Value::from(vec!["a", "b"]))]);
        let told = |error: Objection| format!("line {}: {}", error.line, error.reason);
        Jinja::new(source)
            .and_then(|jinja| jinja.render(words, "2026-11-30T08:15:00"))
            .map_err(told)
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
        assert!(error.contains("line 3"), "{error}");
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
            for shown in ["a", "a == b", "[a, b]|sort", "a in [b]", "a|pprint"] {
                let source = format!("{two}{assign}{{{{ {shown} }}}}");
                render(&source).unwrap();
            }
            // Python fails here too, but rendering must end.
            assert!(render(&format!("{two}{assign}{{{{ a|tojson }}}}")).is_err());
        }
    }

    #[test]
    fn a_namespace_s_value_that_grows_without_end_is_refused() {
        let grown = |value: &str| {
            let grow =
                format!("{{% for i in range(50000) %}}{{% set ns.a = {value} %}}{{% endfor %}}");
            let source = format!("{{% set ns = namespace(a=[]) %}}{grow}");
            render(&source).unwrap_err()
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
            "{{ ('a' * 100000).join('b' * 100000) }}",
            "{{ [['a' * 1000000] * 1000] * 1000 }}",
            "{{ ([['a' * 1000000] * 1000] * 1000) ~ '' }}",
            "{{ ([['a' * 1000000] * 1000] * 1000)|tojson }}",
            "{{ '%s' % [['a' * 1000000] * 1000] }}",
            "{{ '%*d' % (1000000000, 1) }}",
            "{{ 'a'.ljust(1000000000) }}",
            "{{ [0] * 1000000000 }}",
            "{{ range(1000000000)|list }}",
            "{% set ns = namespace(a='a') %}{% for i in range(40) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        ] {
            let error = render(grown).unwrap_err();
            let said = ["out of fuel", "too large", "too many", "width"];
            assert!(said.iter().any(|it| error.contains(it)), "{grown}: {error}");
        }
    }

    #[test]
    fn a_panic_of_the_template_library_is_a_refusal() {
        let refused = on_its_own_stack::<()>(|| panic!("a fault of the library's"));
        assert!(refused.unwrap_err().reason.contains("cannot read it"));
    }

    #[test]
    fn a_template_nested_as_deep_as_it_is_long_has_the_stack_it_needs() {
        let repeated = |before: &str, again: &str, after: &str| {
            let room = MAX_TEMPLATE as usize - before.len() - after.len();
            format!("{before}{}{after}", again.repeat(room / again.len()))
        };
        for (before, again, after) in [
            ("{{ ", "1+", "1 }}"),
            // Fewer repetitions: joining them takes quadratic time, unoptimized a minute.
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
