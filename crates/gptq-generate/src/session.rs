//! Prompts in, text out.

use std::path::Path;
use std::time::Instant;

use gptq_calibration::TextTokenizer;
use gptq_format::read_json;
use gptq_kernels::{Device, Engine, Work};
use gptq_model::{Decoder, Model};
use serde::Serialize;
use serde_json::Value;

use crate::{Choice, GenerateError, Sampler, Stops};

/// How to choose tokens and when to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// How the next token is chosen.
    pub choice: Choice,
    /// Above 1 makes tokens of the prompt and the text so far less likely.
    pub repetition_penalty: f32,
    /// At most this many tokens per reply.
    pub max_new_tokens: usize,
    /// Texts that end a reply, and are not part of it.
    pub stop: Vec<String>,
    /// Go on past the model's end tokens.
    pub ignore_end: bool,
    /// Replies are turns of a conversation: they end at the tokenizer's end token too, whatever the model's
    /// configs say.
    pub turns: bool,
}

/// A prompt's text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The whole of it: of a conversation, every turn.
    pub text: String,
    /// Whether the tokenizer adds its own special tokens.
    pub special_tokens: bool,
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// One of the model's end tokens.
    EndToken,
    /// A stop string.
    StopString,
    /// As many tokens as were asked for.
    Length,
}

/// A finished reply.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reply {
    /// The new text.
    pub text: String,
    /// The new tokens, an end token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// The end token's text, where one ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_token: Option<String>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were still in the cache.
    pub cached_tokens: usize,
    /// From the prompt to the first new token, seconds.
    pub prompt_seconds: f64,
    /// For all further tokens, seconds.
    pub decode_seconds: f64,
}

impl Reply {
    /// Whether it ended before any text: the first token was an end token.
    pub fn ended_at_once(&self) -> bool {
        self.finish == Finish::EndToken && self.tokens.len() == 1
    }

    /// Tokens per second of the prompt.
    pub fn prompt_rate(&self) -> f64 {
        (self.prompt_tokens - self.cached_tokens) as f64 / self.prompt_seconds
    }

    /// Tokens per second after the first; `None` where there is only one.
    pub fn decode_rate(&self) -> Option<f64> {
        let steps = self.tokens.len().checked_sub(1).filter(|&n| n > 0)?;
        Some(steps as f64 / self.decode_seconds)
    }
}

/// Gives the next prompt, if there is one, after the reply to the one before.
pub type Next<'a> = dyn FnMut(Option<&Reply>) -> Result<Option<Prompt>, GenerateError> + 'a;

/// Loads the checkpoint in `dir`, dense or quantized, and answers the prompts that `next` gives,
/// until it gives none. `next` gets the reply to the prompt before; `show` gets text as it comes.
///
/// # Errors
/// A checkpoint that cannot be run, a setting out of its range, or what `next` fails with.
pub fn generate(
    dir: &Path,
    device: Device,
    settings: &Settings,
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
    settings: &'a Settings,
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
    settings: &'a Settings,
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

/// `eos_token_id`, one or several, of `generation_config.json`, else of `config.json`.
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
