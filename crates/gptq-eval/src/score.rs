//! From log-likelihoods to accuracies, as in the harness: `acc`, `acc_norm`, and the standard error of their means.

use serde::{Deserialize, Serialize};

use crate::Question;

/// Choice of a model among those of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// Index of the likeliest choice.
    pub plain: usize,
    /// Index of the choice with the greatest log-likelihood for each of its characters.
    pub normalized: usize,
}

impl Pick {
    /// Chooses among choices with these log-likelihoods; of equals the first. A choice without characters is chosen by length
    /// only where all are as unlikely as can be.
    pub fn of(question: &Question, log_likelihoods: &[f64]) -> Self {
        let characters = question.choices.iter().map(|it| it.chars().count() as f64);
        let each = log_likelihoods.iter().zip(characters);
        Pick {
            plain: likeliest(log_likelihoods.iter().copied()),
            normalized: likeliest(each.map(|(l, n)| l / n)),
        }
    }
}

/// Returns the index of the greatest, of equals the first; like NumPy's `argmax`, that of the first which is no number.
fn likeliest(values: impl Iterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (index, value) in values.enumerate() {
        if value.is_nan() {
            return index;
        }
        if value > best.1 {
            best = (index, value);
        }
    }
    best.0
}

/// A share of right answers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proportion {
    /// The share, 0 to 1.
    pub value: f64,
    /// Its standard error, `sqrt(p (1 - p) / (n - 1))`; `None` for a single question.
    pub stderr: Option<f64>,
}

impl Proportion {
    /// Measures answers, of which there is at least one.
    pub fn of(right: &[bool]) -> Self {
        let n = right.len() as f64;
        let value = right.iter().filter(|right| **right).count() as f64 / n;
        // The sample's standard deviation, over the root of n.
        let variance = value * (1.0 - value) * n / (n - 1.0);
        Proportion {
            value,
            stderr: (right.len() > 1).then(|| (variance / n).sqrt()),
        }
    }
}

/// Answers of a model to a task.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskScore {
    /// Its choices, one for each question.
    pub choices: Vec<Pick>,
    /// Those by likelihood that are right.
    pub right: Vec<bool>,
    /// Share of right answers by likelihood.
    pub accuracy: Proportion,
    /// Share of right answers by likelihood for each character.
    pub accuracy_norm: Proportion,
}

impl TaskScore {
    /// Scores the log-likelihoods of all choices of all `questions`, of which there is at least one.
    pub fn of(questions: &[Question], log_likelihoods: &[Vec<f64>]) -> Self {
        let both = questions.iter().zip(log_likelihoods);
        let choices: Vec<Pick> = both.map(|(q, l)| Pick::of(q, l)).collect();
        let with = |choice: fn(&Pick) -> usize| -> Vec<bool> {
            let both = questions.iter().zip(&choices);
            both.map(|(q, it)| choice(it) == q.answer).collect()
        };
        let right = with(|it| it.plain);
        TaskScore {
            accuracy: Proportion::of(&right),
            accuracy_norm: Proportion::of(&with(|it| it.normalized)),
            right,
            choices,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(choices: &[&str]) -> Question {
        Question {
            place: "row 0".into(),
            text: String::new(),
            choices: choices.iter().map(|it| it.to_string()).collect(),
            answer: 0,
        }
    }

    #[test]
    fn of_equals_the_first_is_chosen_and_length_counts_in_characters() {
        let of = |choices: &[&str], l: &[f64]| Pick::of(&question(choices), l);
        let tie = of(&["a", "b", "c"], &[-2.0, -1.0, -1.0]);
        assert_eq!((tie.plain, tie.normalized), (1, 1));
        // Two characters of two bytes each: -1 a character against -0.9.
        let long = of(&["éé", "b"], &[-2.0, -0.9]);
        assert_eq!((long.plain, long.normalized), (1, 1));
        let long = of(&["éé", "b"], &[-1.7, -0.9]);
        assert_eq!((long.plain, long.normalized), (1, 0));
        // -1 / 0 is an infinity, and 0 / 0 no number, which NumPy's argmax takes for the greatest.
        assert_eq!(of(&["", "b"], &[-1.0, -9.0]).normalized, 1);
        assert_eq!(of(&["a", ""], &[-1.0, 0.0]).normalized, 1);
    }

    #[test]
    fn a_standard_error_is_that_of_the_sample() {
        let found = Proportion::of(&[true, true, false, true]);
        assert_eq!(found.value, 0.75);
        // Deviations (1/4)² thrice and (3/4)² once, over 3, over 4.
        let right = (0.75f64 / 3.0 / 4.0).sqrt();
        assert!((found.stderr.unwrap() - right).abs() < 1e-15);
        assert_eq!(Proportion::of(&[true]).stderr, None);
    }
}
