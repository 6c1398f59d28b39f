//! MMLU (Hendrycks et al., 2021): a CSV of each subject, such as `anatomy_test.csv`, without a heading: the question, four
//! choices, and the letter of the right one.
//!
//! Template and description: `tasks/mmlu/default` of lm_eval 0.4.13.

use std::path::Path;

use gptq_calibration::{Map, Value};

use super::rows::file_stem;
use crate::EvalError;
use crate::question::{QuestionRow, letter};

/// Template of the harness.
pub(crate) const TEMPLATE: &str = "{{ question.strip() }}\nA. {{ choices[0] }}\nB. {{ choices[1] }}\nC. {{ choices[2] }}\n\
                                   D. {{ choices[3] }}\nAnswer:";

/// Splits of a subject, as file names end.
const SPLITS: [&str; 3] = ["_test", "_dev", "_val"];

/// Returns the subject of a file, such as `college_biology`.
pub(crate) fn subject(path: &Path) -> String {
    let stem = file_stem(path);
    let bare = SPLITS.iter().find_map(|split| stem.strip_suffix(split));
    bare.unwrap_or(&stem).to_owned()
}

/// Returns the sentence before shots and questions.
pub(crate) fn description(path: &Path) -> String {
    let subject = subject(path).replace('_', " ");
    format!("The following are multiple choice questions (with answers) about {subject}.\n\n")
}

/// Reads the rows.
pub(crate) fn read(path: &Path) -> Result<Vec<QuestionRow>, EvalError> {
    let reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .from_path(path);
    let mut reader = reader.map_err(|error| EvalError::file(path, error.to_string()))?;
    let mut rows = Vec::new();
    for (index, record) in reader.records().enumerate() {
        let place = format!("row {index}");
        let record =
            record.map_err(|error| EvalError::row(path, &place, "record", error.to_string()))?;
        let cells: Vec<&str> = record.iter().collect();
        let [question, a, b, c, d, right] = cells.as_slice() else {
            let reason = format!(
                "{} columns; MMLU's are the question, four choices and the answer's letter",
                cells.len()
            );
            return Err(EvalError::row(path, &place, "record", reason));
        };
        let answer = (0..4).find(|index| letter(*index) == Some(right.trim()));
        let answer = answer.ok_or_else(|| {
            EvalError::row(
                path,
                &place,
                "answer",
                format!("{right:?} is none of A, B, C and D"),
            )
        })?;
        let options: Vec<String> = [a, b, c, d].map(|it| (*it).to_owned()).to_vec();
        let values = Map::from_iter([
            ("question".to_owned(), Value::from(*question)),
            ("choices".to_owned(), Value::from(options)),
        ]);
        rows.push(QuestionRow {
            place,
            values,
            choices: ["A", "B", "C", "D"].map(String::from).to_vec(),
            answer,
        });
    }
    match rows.is_empty() {
        true => Err(EvalError::file(path, "no rows")),
        false => Ok(rows),
    }
}
