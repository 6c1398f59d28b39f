//! Runs prompts and returns replies.

use std::path::Path;
use std::time::Instant;

use gptq_calibration::TextTokenizer;
use gptq_format::read_json;
use gptq_kernels::{Device, Engine, Work};
use gptq_model::{Decoder, Model};
use serde::Serialize;
use serde_json::Value;

use crate::{GenerateError, Sampler, Stops, TokenChoice};

/// Sampling and stopping options.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Method of choosing the next token.
    pub choice: TokenChoice,
    /// Repetition penalty: above 1, tokens of the prompt and the text so far become less likely.
    pub repetition_penalty: f32,
    /// Maximum number of tokens per reply.
    pub max_new_tokens: usize,
    /// Strings that end a reply; they are not part of it.
    pub stop: Vec<String>,
    /// Continue past the model's end tokens.
    pub ignore_end: bool,
    /// Replies are turns of a conversation: they also end at the tokenizer's end token, whatever
    /// the model's configs say.
    pub turns: bool,
}

/// Text of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The whole text; for a conversation, all turns.
    pub text: String,
    /// True if the tokenizer adds its own special tokens.
    pub special_tokens: bool,
}

/// Reason why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// One of the model's end tokens.
    EndToken,
    /// A stop string.
    StopString,
    /// The maximum number of tokens.
    Length,
}

/// A finished reply.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reply {
    /// The new text.
    pub text: String,
    /// The new tokens, an end token included.
    pub tokens: Vec<u32>,
    /// Reason why it ended.
    pub finish: Finish,
    /// Text of the end token, if one ended the reply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_token: Option<String>,
    /// Number of prompt tokens.
    pub prompt_tokens: usize,
    /// Number of prompt tokens that were still in the cache.
    pub cached_tokens: usize,
    /// Seconds from the prompt to the first new token.
    pub prompt_seconds: f64,
    /// Seconds for all further tokens.
    pub decode_seconds: f64,
}

impl Reply {
    /// Returns true if it ended before any text: the first token was an end token.
    pub fn ended_at_once(&self) -> bool {
        self.finish == Finish::EndToken && self.tokens.len() == 1
    }

    /// Returns the prompt's tokens per second.
    pub fn prompt_rate(&self) -> f64 {
        (self.prompt_tokens - self.cached_tokens) as f64 / self.prompt_seconds
    }

    /// Returns the tokens per second after the first; `None` if there is only one.
    pub fn decode_rate(&self) -> Option<f64> {
        let steps = self.tokens.len().checked_sub(1).filter(|&n| n > 0)?;
        Some(steps as f64 / self.decode_seconds)
    }
}

/// Returns the next prompt, if any, given the reply to the previous one.
pub type Next<'a> = dyn FnMut(Option<&Reply>) -> Result<Option<Prompt>, GenerateError> + 'a;

/// Loads the checkpoint in `dir`, dense or quantized, and answers the prompts that `next` returns,
/// until it returns none. `next` receives the reply to the previous prompt; `show` receives text as
/// it is generated.
///
/// # Errors
/// A checkpoint that cannot be run, a setting that is out of range, or an error of `next`.
pub fn generate(
    dir: &Path,
    device: Device,
    settings: &GenerateOptions,
    next: &mut Next<'_>,
    show: &mut dyn FnMut(&str),
) -> Result<(), GenerateError> {
    device.resolve()?.run(Generate {
        dir,
        settings,
        next,
        show,
    })?
}

struct Generate<'a> {
    dir: &'a Path,
    settings: &'a GenerateOptions,
    next: &'a mut Next<'a>,
    show: &'a mut dyn FnMut(&str),
}

impl Work for Generate<'_> {
    type Output = Result<(), GenerateError>;

    fn run<B: Engine>(self, device: B::Device) -> Self::Output {
        let sampler = Sampler::new(self.settings.choice, self.settings.repetition_penalty)?;
        let mut prompt = (self.next)(None)?;
        let tokenizer = TextTokenizer::load(self.dir)?;
        let mut ends = match self.settings.ignore_end {
            true => Vec::new(),
            false => end_tokens(self.dir)?,
        };
        if self.settings.turns && !self.settings.ignore_end {
            ends.extend(tokenizer.end().map(|end| end.id));
        }
        let mut session = Session {
            dir: self.dir,
            settings: self.settings,
            tokenizer,
            ends,
            decoder: Decoder::<B>::load(&Model::open(self.dir, &device)?)?,
            sampler,
        };
        while let Some(text) = prompt {
            let reply = session.reply(&text, self.show)?;
            prompt = (self.next)(Some(&reply))?;
        }
        Ok(())
    }
}

struct Session<'a, B: Engine> {
    dir: &'a Path,
    settings: &'a GenerateOptions,
    tokenizer: TextTokenizer,
    ends: Vec<u32>,
    decoder: Decoder<B>,
    sampler: Sampler,
}

impl<B: Engine> Session<'_, B> {
    fn reply(
        &mut self,
        prompt: &Prompt,
        show: &mut dyn FnMut(&str),
    ) -> Result<Reply, GenerateError> {
        let mut context = (self.tokenizer).encode(&prompt.text, prompt.special_tokens)?;
        let prompt_tokens = context.len();
        if prompt_tokens == 0 {
            return Err(GenerateError::EmptyPrompt);
        }
        let cached_tokens = self.decoder.reusable(&context);
        let mut stops = Stops::new(&self.settings.stop);
        let mut text = String::new();
        let mut give = |piece: String| {
            if !piece.is_empty() {
                show(&piece);
                text += &piece;
            }
        };
        let mut finish = Finish::Length;
        let started = Instant::now();
        let mut prompt_seconds = 0.0;
        let mut pieces = self.tokenizer.decoder(&context)?;
        for step in 0..self.settings.max_new_tokens {
            let logits = self.decoder.next_logits(&context)?;
            if step == 0 {
                prompt_seconds = started.elapsed().as_secs_f64();
            }
            if !logits.iter().all(|l| l.is_finite()) {
                return Err(GenerateError::NonFiniteLogits {
                    dir: self.dir.into(),
                });
            }
            let token = self.sampler.next(logits, &context);
            context.push(token);
            if self.ends.contains(&token) {
                finish = Finish::EndToken;
                break;
            }
            let (piece, stopped) = stops.push(&pieces.push(token)?);
            give(piece);
            if stopped {
                finish = Finish::StopString;
                break;
            }
        }
        if finish != Finish::StopString {
            give(stops.finish());
        }
        let end_token = match finish {
            Finish::EndToken => Some(self.tokenizer.decode(&context[context.len() - 1..])?),
            _ => None,
        };
        Ok(Reply {
            text,
            tokens: context.split_off(prompt_tokens),
            finish,
            end_token,
            prompt_tokens,
            cached_tokens,
            prompt_seconds,
            decode_seconds: started.elapsed().as_secs_f64() - prompt_seconds,
        })
    }
}

/// Returns `eos_token_id`, one or several, of `generation_config.json`, else of `config.json`.
fn end_tokens(dir: &Path) -> Result<Vec<u32>, GenerateError> {
    for file in ["generation_config.json", "config.json"] {
        let path = dir.join(file);
        if !path.exists() {
            continue;
        }
        let config: Value = read_json(&path)?;
        let ids = match &config["eos_token_id"] {
            Value::Array(list) => list.clone(),
            one => vec![one.clone()],
        };
        let ids: Vec<u32> = ids
            .iter()
            .filter_map(|id| u32::try_from(id.as_u64()?).ok())
            .collect();
        if !ids.is_empty() {
            return Ok(ids);
        }
    }
    Ok(Vec::new())
}
