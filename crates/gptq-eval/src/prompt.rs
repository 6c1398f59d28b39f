//! Template of questions: Jinja, as lm-evaluation-harness has it, with the string methods of Python.

use gptq_calibration::{Map, Value};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};

use crate::EvalError;

/// Steps after which a template counts as endless.
const FUEL: u64 = 1_000_000;

/// Name of the only template in an environment.
const NAME: &str = "question";

/// A compiled template.
pub(crate) struct PromptText {
    environment: Environment<'static>,
}

impl PromptText {
    /// Compiles a template.
    ///
    /// # Errors
    /// One that does not parse.
    pub(crate) fn new(source: &str) -> Result<Self, EvalError> {
        let failed = |error: minijinja::Error| EvalError::Template {
            reason: format!("{source:?} does not parse: {}", reason(&error)),
        };
        let mut environment = Environment::new();
        // Jinja's own delimiters.
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.map_err(failed)?);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(failed)?;
        Ok(PromptText { environment })
    }

    /// Makes the text of a row.
    ///
    /// # Errors
    /// A key that the row does not have, or a mistake in the template; the error is half a sentence.
    pub(crate) fn render(&self, values: &Map) -> Result<String, String> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|e| reason(&e))?;
        let values = Serde(Value::Object(values.clone()));
        template.render(values).map_err(|e| reason(&e))
    }
}

/// Says in one line what is wrong.
fn reason(error: &minijinja::Error) -> String {
    let detail = error.detail().map(|detail| format!(": {detail}"));
    let line = error.line().map(|line| format!(", line {line}"));
    let (detail, line) = (detail.unwrap_or_default(), line.unwrap_or_default());
    format!("{}{detail}{line}", error.kind())
}
