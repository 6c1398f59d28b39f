//! MedMCQA (Pal et al., 2022): rows with `question`, options `opa` to `opd`, and `cop`, the right one. The authors' files count
//! it from 1, copies on the Hub from 0: a file with a 4 is one of the former, one with a 0 of the latter.
//!
//! Template: `tasks/medmcqa` of lm_eval 0.4.13.

use std::path::Path;

use gptq_calibration::{Map, Value};

use super::rows;
use crate::EvalError;
use crate::question::QuestionRow;

/// Template of the harness.
pub(crate) const TEMPLATE: &str = "Question: {{ question }}\nChoices:\nA. {{ opa }}\nB. {{ opb }}\nC. {{ opc }}\nD. {{ opd }}\nAnswer:";

/// Reads the rows.
pub(crate) fn read(path: &Path) -> Result<Vec<QuestionRow>, EvalError> {
    let rows = rows::read(path)?;
    let mut counted = Vec::with_capacity(rows.len());
    for (place, row) in &rows {
        let right = rows::cell(path, place, row, "cop")?;
        let index = right.as_u64().filter(|index| *index <= 4);
        counted.push(index.ok_or_else(|| {
            let reason = format!(
                "{} is not the number of an option; test questions have none, use the validation file",
                rows::brief(right)
            );
            EvalError::row(path, place, "cop", reason)
        })?);
    }
    let first = match (counted.contains(&0), counted.contains(&4)) {
        (true, false) => 0,
        (false, true) => 1,
        (true, true) => {
            return Err(EvalError::file(
                path,
                "\"cop\" is 0 in one row and 4 in another, so it counts neither from 0 nor from 1",
            ));
        }
        (false, false) => {
            return Err(EvalError::file(
                path,
                "no row has a \"cop\" of 0 or 4, so that nothing says whether it counts from 0 or from 1; add a row",
            ));
        }
    };
    let questions = rows.into_iter().zip(counted);
    questions
        .map(|((place, row), right)| {
            for key in ["question", "opa", "opb", "opc", "opd"] {
                rows::text(path, &place, &row, key)?;
            }
            Ok(question(place, row, (right - first) as usize))
        })
        .collect()
}

fn question(place: String, row: Map, answer: usize) -> QuestionRow {
    let option = |key: &str| row.get(key).cloned().unwrap_or_default();
    let options: Vec<Value> = ["opa", "opb", "opc", "opd"].map(option).to_vec();
    let mut values = row;
    values.insert("choices".to_owned(), Value::Array(options));
    QuestionRow {
        place,
        values,
        choices: ["A", "B", "C", "D"].map(String::from).to_vec(),
        answer,
    }
}
