//! Prompts and choices as tokens.
//!
//! Prompt and choice are encoded together, and what lies beyond the prompt's own tokens is the choice: `[0..n]` of the prompt
//! alone, `[n..]` of both. Spaces at a prompt's end go to the choice first. What does not fit the model is cut from the left. All as in
//! `_encode_pair`, `tok_encode` and `_loglikelihood_tokens` of the harness.
//!
//! Without a boundary between the two, the beginning of a choice may become part of the prompt's last token, which is then neither
//! in the prompt as it is given nor scored. A choice of which nothing is left has the log-likelihood 0, above any other: the
//! harness says so too, where it does not stop.

use gptq_calibration::TextTokenizer;
use rayon::prelude::*;

use crate::{EvalError, Question, Task};

/// Tokens of a prompt and a choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChoiceRequest {
    /// Both, as much of them as the model takes and one more, which is only predicted.
    pub tokens: Vec<u32>,
    /// Number of tokens of the choice, the last ones: fewer than all, and 0 where nothing is to be predicted.
    pub scored: usize,
}

/// Requests of a task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncodedTask {
    /// One for each choice of each question.
    pub questions: Vec<Vec<ChoiceRequest>>,
    /// Number of requests that were cut.
    pub cut: usize,
    /// Places of choices that have no token of their own.
    pub without_tokens: Vec<String>,
}

/// Encodes prompts for one model.
pub struct Encoder<'a> {
    tokenizer: &'a TextTokenizer,
    /// The tokenizer's own special tokens are added.
    special_tokens: bool,
    /// Tokens that the model takes at once.
    context: usize,
}

impl<'a> Encoder<'a> {
    /// Makes an encoder for a model that takes `context` tokens; the tokenizer's own special tokens are added if
    /// `special_tokens`.
    pub fn new(tokenizer: &'a TextTokenizer, special_tokens: bool, context: usize) -> Self {
        Encoder {
            tokenizer,
            special_tokens,
            context,
        }
    }

    /// Returns true if prompts begin with a token that the tokenizer adds.
    pub fn adds_beginning(&self) -> bool {
        self.special_tokens && self.tokenizer.beginning().is_some()
    }

    /// Encodes every question of a task.
    ///
    /// # Errors
    /// A choice with more tokens than the model takes; a prompt without tokens.
    pub fn encode(&self, task: &Task) -> Result<EncodedTask, EvalError> {
        let questions = task.questions.par_iter();
        let encoded = questions.map(|question| self.question(task, question));
        let encoded: Vec<Vec<(ChoiceRequest, bool)>> = encoded.collect::<Result<_, _>>()?;
        let cut = encoded.iter().flatten().filter(|(_, cut)| *cut).count();
        let empty = |it: &Vec<(ChoiceRequest, bool)>| it.iter().any(|(it, _)| it.scored == 0);
        let places = encoded.iter().zip(&task.questions);
        let places = places.filter(|(encoded, _)| empty(encoded));
        let without_tokens = places.map(|(_, question)| question.place.clone()).collect();
        let requests =
            |question: Vec<(ChoiceRequest, bool)>| question.into_iter().map(|(it, _)| it);
        Ok(EncodedTask {
            without_tokens,
            questions: (encoded.into_iter())
                .map(|question| requests(question).collect())
                .collect(),
            cut,
        })
    }

    fn question(
        &self,
        task: &Task,
        question: &Question,
    ) -> Result<Vec<(ChoiceRequest, bool)>, EvalError> {
        let prompt = task.prompt(question);
        // Spaces at the end are encoded with the choice, so that words keep their boundaries.
        let trimmed = prompt.trim_end_matches(is_space);
        let spaces = prompt.get(trimmed.len()..).unwrap_or_default();
        let before = match prompt.is_empty() {
            true => Vec::new(),
            false => self.tokens(trimmed)?,
        };
        let choices = question.choices.iter();
        choices
            .map(|choice| {
                let text = format!("{}{choice}", task.delimiter);
                let (mut tokens, scored) = match prompt.is_empty() {
                    true => self.after_nothing(task, question, &text)?,
                    false => {
                        let whole = self.tokens(&format!("{trimmed}{spaces}{text}"))?;
                        let scored = whole.get(before.len()..).unwrap_or_default();
                        ([&before[..], scored].concat(), scored.len())
                    }
                };
                if scored > self.context {
                    return Err(EvalError::LongChoice {
                        path: task.file.clone(),
                        place: question.place.clone(),
                        choice: choice.chars().take(40).collect(),
                        tokens: scored,
                        context: self.context,
                    });
                }
                if tokens.len() <= scored {
                    return Err(EvalError::NoPrompt {
                        path: task.file.clone(),
                        place: question.place.clone(),
                    });
                }
                let over = tokens.len().saturating_sub(self.context + 1);
                tokens.drain(..over);
                Ok((ChoiceRequest { tokens, scored }, over > 0))
            })
            .collect()
    }

    /// Tokens of a choice without a prompt, behind the token that begins texts, and how many of them are scored.
    fn after_nothing(
        &self,
        task: &Task,
        question: &Question,
        text: &str,
    ) -> Result<(Vec<u32>, usize), EvalError> {
        let Some(first) = self.first_token() else {
            return Err(EvalError::NoPrompt {
                path: task.file.clone(),
                place: question.place.clone(),
            });
        };
        let mut tokens = self.tokenizer.encode(text, false)?;
        if tokens.first() != Some(&first.id) {
            tokens.insert(0, first.id);
        }
        let scored = tokens.len() - 1;
        Ok((tokens, scored))
    }

    /// The token that stands for an empty prompt, and before which no other is added.
    fn first_token(&self) -> Option<&gptq_calibration::SpecialToken> {
        self.tokenizer.bos().or(self.tokenizer.end())
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>, EvalError> {
        let begins = |token: &gptq_calibration::SpecialToken| text.starts_with(&token.text);
        let add = self.special_tokens && !self.first_token().is_some_and(begins);
        Ok(self.tokenizer.encode(text, add)?)
    }
}

/// Returns true for characters that Python's `str.isspace` is true for.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}
