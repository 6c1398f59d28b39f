//! A question as read from a row.

use gptq_calibration::{Map, Value};

/// Most choices of a question.
pub(crate) const MAX_CHOICES: usize = 256;

/// Names of choices, in their order.
const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// A question that a model is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Place in its file, such as `row 7`.
    pub place: String,
    /// Text that the template makes of it, without shots.
    pub text: String,
    /// Texts whose likelihoods are compared, at least 2.
    pub choices: Vec<String>,
    /// Index of the right one.
    pub answer: usize,
}

/// A row, before a template makes a text of it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct QuestionRow {
    pub(crate) place: String,
    /// Values that a template may use.
    pub(crate) values: Map,
    pub(crate) choices: Vec<String>,
    pub(crate) answer: usize,
}

/// Rows of a file, and those beside them that may serve as shots.
#[derive(Clone, Debug, Default)]
pub(crate) struct TaskRows {
    pub(crate) questions: Vec<QuestionRow>,
    pub(crate) others: Vec<QuestionRow>,
}

/// Returns the letter of choice `index`, if it has one.
pub(crate) fn letter(index: usize) -> Option<&'static str> {
    LETTERS.get(index..index + 1)
}

/// Returns the index that `value` names among `choices`: a number from 0, a letter, or a choice's text.
///
/// # Errors
/// None of these, or two of them that disagree; the error is half a sentence.
pub(crate) fn answer(value: &Value, choices: &[String]) -> Result<usize, String> {
    let n = choices.len();
    if let Some(index) = value.as_u64() {
        let index = usize::try_from(index).ok().filter(|index| *index < n);
        return index.ok_or_else(|| {
            format!("{value} is not one of the {n} choices, which are numbered from 0")
        });
    }
    let Some(text) = value.as_str() else {
        return Err(format!(
            "{value} is neither the index of a choice, from 0, nor its letter"
        ));
    };
    let by_letter = (0..n).find(|index| letter(*index) == Some(text));
    let by_text = choices.iter().position(|choice| choice == text);
    match (by_letter, by_text) {
        (Some(one), Some(other)) if one != other => Err(format!(
            "{text:?} is the letter of choice {one} and the text of choice {other}; give an index, from 0"
        )),
        (Some(index), _) | (None, Some(index)) => Ok(index),
        (None, None) => Err(format!(
            "{text:?} is neither the letter nor the text of one of the {n} choices"
        )),
    }
}

/// Checks the number of choices; the error is half a sentence.
pub(crate) fn check_choices(choices: &[String]) -> Result<(), String> {
    match choices.len() {
        0 | 1 => Err(format!("{} choices; at least 2 are needed", choices.len())),
        n if n > MAX_CHOICES => Err(format!("{n} choices, over the limit of {MAX_CHOICES}")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_an_index_a_letter_or_a_text_and_never_two_of_them() {
        let choices = ["yes", "no", "A"].map(String::from);
        let value = |json: &str| serde_json::from_str::<Value>(json).unwrap();
        for (json, index) in [("1", 1), ("\"B\"", 1), ("\"yes\"", 0), ("\"C\"", 2)] {
            assert_eq!(answer(&value(json), &choices), Ok(index), "{json}");
        }
        for (json, word) in [
            ("3", "numbered from 0"),
            ("-1", "neither"),
            ("\"D\"", "neither"),
            ("\"A\"", "give an index"),
            ("null", "neither"),
            ("1.5", "neither"),
        ] {
            let error = answer(&value(json), &choices).unwrap_err();
            assert!(error.contains(word), "{json}: {error}");
        }
        let letters = ["A", "B"].map(String::from);
        assert_eq!(answer(&value("\"B\""), &letters), Ok(1));
        assert!(check_choices(&letters[..1]).is_err());
    }
}
