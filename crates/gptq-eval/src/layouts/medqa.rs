//! MedQA (Jin et al., 2020): rows with `question`, `options` by letter, four or five, and `answer_idx`, the right one's.
//!
//! Template: `tasks/medqa` of lm_eval 0.4.13, which has four options.

use std::path::Path;

use gptq_calibration::Value;

use super::rows;
use crate::EvalError;
use crate::question::{QuestionRow, check_choices, letter};

/// Template of the harness.
pub(crate) const TEMPLATE: &str = "Question: {{ question }}\n{% for letter in options %}{{ letter }}. {{ options[letter] }}\n{% endfor %}Answer:";

/// Reads the rows.
pub(crate) fn read(path: &Path) -> Result<Vec<QuestionRow>, EvalError> {
    let rows = rows::read(path)?.into_iter();
    rows.map(|(place, mut values)| {
        let wrong = |key: &str, reason: String| EvalError::row(path, &place, key, reason);
        rows::text(path, &place, &values, "question")?;
        let options = rows::cell(path, &place, &values, "options")?;
        let Some(options) = options.as_object() else {
            return Err(wrong(
                "options",
                format!("{} is not an object by letter", rows::brief(options)),
            ));
        };
        let letters: Vec<String> = options.keys().cloned().collect();
        check_choices(&letters).map_err(|why| wrong("options", why))?;
        let in_order = (letters.iter().enumerate()).all(|(at, it)| letter(at) == Some(it.as_str()));
        let texts = options.values().map(|it| it.as_str().map(String::from));
        let texts: Option<Vec<String>> = texts.collect();
        let Some(texts) = texts.filter(|_| in_order) else {
            return Err(wrong(
                "options",
                "not texts under A, B, C and so on, in this order".to_owned(),
            ));
        };
        let right = rows::text(path, &place, &values, "answer_idx")?;
        let answer = letters.iter().position(|it| it == right);
        let answer = answer
            .ok_or_else(|| wrong("answer_idx", format!("{right:?} is not one of the options")))?;
        values.insert("choices".to_owned(), Value::from(texts));
        Ok(QuestionRow {
            place,
            values,
            choices: letters,
            answer,
        })
    })
    .collect()
}
