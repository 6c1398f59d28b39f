//! PubMedQA (Jin et al., 2019): an object with a question for each PubMed id, `{"QUESTION", "CONTEXTS", "final_decision", ...}`,
//! and one with the answers of the test questions, `test_ground_truth.json`, beside it.
//!
//! Template and choices: `tasks/pubmedqa` of lm_eval 0.4.13.

use std::path::Path;

use gptq_calibration::{Map, Value};
use gptq_format::read_json_within;

use super::rows;
use crate::EvalError;
use crate::question::{QuestionRow, TaskRows};

/// Template of the harness.
pub(crate) const TEMPLATE: &str = "Abstract: {{ context }}\nQuestion: {{ question }}\nAnswer:";

const CHOICES: [&str; 3] = ["yes", "no", "maybe"];

/// Most bytes of a file.
const MAX_FILE: u64 = 64 << 20;

/// Name of the file with the test questions' answers, where none is given.
const SPLIT: &str = "test_ground_truth.json";

/// Reads the test questions, and the others: all are test questions if no file says which.
pub(crate) fn read(path: &Path, split: Option<&Path>) -> Result<TaskRows, EvalError> {
    let all = object(path)?;
    let beside = path.with_file_name(SPLIT);
    let split = match split {
        Some(split) => Some(split),
        None => Some(beside.as_path()).filter(|beside| beside.is_file()),
    };
    let truth = split.map(object).transpose()?;
    let mut found = TaskRows::default();
    for (id, value) in &all {
        let place = format!("key {id}");
        let Some(row) = value.as_object() else {
            let reason = "not an object with QUESTION and CONTEXTS";
            return Err(EvalError::row(path, &place, id, reason));
        };
        let question = question(path, place, row)?;
        let right = truth.as_ref().map(|truth| truth.get(id.as_str()));
        match (right, split) {
            (Some(None), _) => found.others.push(question),
            (Some(Some(right)), Some(split))
                if right.as_str() != CHOICES.get(question.answer).copied() =>
            {
                let reason = format!(
                    "{} is not the final_decision of {}",
                    rows::brief(right),
                    path.display()
                );
                return Err(EvalError::row(split, &question.place, id, reason));
            }
            _ => found.questions.push(question),
        }
    }
    if let (Some(truth), Some(split)) = (&truth, split) {
        let strange = truth.keys().find(|id| !all.contains_key(id.as_str()));
        if let Some(id) = strange {
            let reason = format!("not a question of {}", path.display());
            return Err(EvalError::row(split, &format!("key {id}"), id, reason));
        }
    }
    match found.questions.is_empty() {
        true => Err(EvalError::file(path, "no questions")),
        false => Ok(found),
    }
}

fn object(path: &Path) -> Result<Map, EvalError> {
    match read_json_within::<Value>(path, MAX_FILE)? {
        Value::Object(object) => Ok(object),
        other => Err(EvalError::file(
            path,
            format!("{} is not an object by PubMed id", rows::brief(&other)),
        )),
    }
}

fn question(path: &Path, place: String, row: &Map) -> Result<QuestionRow, EvalError> {
    let question = rows::text(path, &place, row, "QUESTION")?;
    let context = rows::texts(path, &place, row, "CONTEXTS")?.join("\n");
    let decision = rows::text(path, &place, row, "final_decision")?;
    let answer = CHOICES.iter().position(|choice| *choice == decision);
    let answer = answer.ok_or_else(|| {
        let reason = format!("{decision:?} is none of yes, no and maybe");
        EvalError::row(path, &place, "final_decision", reason)
    })?;
    let choices = CHOICES.map(String::from).to_vec();
    let mut values = row.clone();
    values.insert("context".to_owned(), context.into());
    values.insert("question".to_owned(), question.into());
    values.insert("choices".to_owned(), choices.clone().into());
    Ok(QuestionRow {
        place,
        values,
        choices,
        answer,
    })
}
