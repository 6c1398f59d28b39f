//! Rows in this program's own layout: `prompt`, or `question` and perhaps `context`; `choices`, a list of texts; and
//! `answer`, the index of the right one, from 0, or its letter. Other keys are for templates.

use std::path::Path;

use gptq_calibration::Value;

use super::rows;
use crate::EvalError;
use crate::question::{QuestionRow, answer, check_choices};

/// Template of rows that have none of their own.
pub(crate) const TEMPLATE: &str = "{% if prompt is defined %}{{ prompt }}{% else %}{% if context is defined %}{{ context }}\n\
                                   {% endif %}Question: {{ question }}\nAnswer:{% endif %}";

/// Reads the rows.
pub(crate) fn read(path: &Path) -> Result<Vec<QuestionRow>, EvalError> {
    let rows = rows::read(path)?.into_iter();
    rows.map(|(place, mut values)| {
        let has = |key: &str| values.contains_key(key);
        let text = match (has("prompt"), has("question")) {
            (true, _) => vec!["prompt"],
            (false, true) if has("context") => vec!["context", "question"],
            (false, true) => vec!["question"],
            (false, false) => {
                let reason = "missing, and so is \"question\"; a row has one of them";
                return Err(EvalError::row(path, &place, "prompt", reason));
            }
        };
        for key in text {
            rows::text(path, &place, &values, key)?;
        }
        let choices = rows::texts(path, &place, &values, "choices")?;
        check_choices(&choices).map_err(|why| EvalError::row(path, &place, "choices", why))?;
        let right = rows::cell(path, &place, &values, "answer")?;
        let answer =
            answer(right, &choices).map_err(|why| EvalError::row(path, &place, "answer", why))?;
        values.insert("choices".to_owned(), Value::from(choices.clone()));
        Ok(QuestionRow {
            place,
            values,
            choices,
            answer,
        })
    })
    .collect()
}
