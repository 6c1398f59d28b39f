//! `gptq generate`: streams text to standard output; prompts and speed go to standard error.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use gptq_calibration::{ChatTemplate, Message};
use gptq_generate::{GenerateError, GenerateOptions, Prompt, Reply, TokenChoice, generate};
use gptq_kernels::Device;
use gptq_spec::Census;
use serde_json::json;

use crate::log;

#[derive(Args)]
pub(crate) struct GenerateArgs {
    /// A branch directory, or a dense checkpoint
    dir: PathBuf,
    /// Continue this text
    #[arg(long, value_name = "TEXT", required_unless_present = "chat")]
    prompt: Option<String>,
    /// Chat: one message per line of standard input
    #[arg(long, conflicts_with = "prompt")]
    chat: bool,
    /// Template of messages; without it, --prompt is used as it is, and --chat uses the tokenizer's
    /// own template if there is one, else ChatML
    #[arg(long, value_name = "NAME")]
    chat_template: Option<PromptFormat>,
    /// The system message; requires a template
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Maximum number of tokens per reply
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one)]
    max_new_tokens: usize,
    /// Choose the most likely token each time
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "seed"])]
    greedy: bool,
    /// Divide logits by this
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    temperature: f32,
    /// Choose among this many of the most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 40)]
    top_k: usize,
    /// Choose among the most likely tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 0.95)]
    top_p: f32,
    /// Above 1, make tokens seen before less likely [default: 1.1, or 1 with --greedy]
    #[arg(long, value_name = "R")]
    repetition_penalty: Option<f32>,
    /// Seed of the draw
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// A text that ends a reply; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Continue past the model's end tokens
    #[arg(long)]
    ignore_eos: bool,
    /// auto, cpu, cuda or cuda:N
    #[arg(short, long, default_value = "auto")]
    device: Device,
    /// Print each finished reply as a line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PromptFormat {
    /// <|im_start|>role ... <|im_end|>
    Chatml,
    /// The tokenizer's own
    Own,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("not a whole number above 0".into()),
    }
}

pub(crate) fn run(args: GenerateArgs) -> Result<()> {
    let template = args.template()?;
    anyhow::ensure!(
        template.is_some() || args.system.is_none(),
        "--system needs a template: use --chat-template chatml or --chat-template own"
    );
    for warning in &Census::take(&args.dir)?.warnings {
        log::warning(warning);
    }
    let settings = args.settings(template.as_ref());
    let (json, dir, device) = (args.json, args.dir.clone(), args.device);
    let mut talk = Talk::new(args, template);
    generate(
        &dir,
        device,
        &settings,
        &mut |reply| talk.next(reply),
        &mut |text| {
            if !json {
                out(text);
            }
        },
    )?;
    Ok(())
}

impl GenerateArgs {
    fn template(&self) -> Result<Option<ChatTemplate>> {
        let own = || ChatTemplate::of(&self.dir);
        Ok(match (self.chat_template, self.chat) {
            (None, false) => None,
            (None, true) => Some(own()?.unwrap_or_else(ChatTemplate::chatml)),
            (Some(PromptFormat::Chatml), _) => Some(ChatTemplate::chatml()),
            (Some(PromptFormat::Own), _) => match own()? {
                Some(template) => Some(template),
                None => anyhow::bail!(
                    "{}: the tokenizer has no chat template; use --chat-template chatml",
                    self.dir.display()
                ),
            },
        })
    }

    fn settings(&self, template: Option<&ChatTemplate>) -> GenerateOptions {
        let mut stop = self.stop.clone();
        stop.extend(
            template
                .and_then(ChatTemplate::end_of_turn)
                .map(String::from),
        );
        GenerateOptions {
            choice: match self.greedy {
                true => TokenChoice::Greedy,
                false => TokenChoice::Sample {
                    temperature: self.temperature,
                    top_k: self.top_k,
                    top_p: self.top_p,
                    seed: self.seed,
                },
            },
            repetition_penalty: (self.repetition_penalty).unwrap_or(if self.greedy {
                1.0
            } else {
                1.1
            }),
            max_new_tokens: self.max_new_tokens,
            stop,
            ignore_end: self.ignore_eos,
            turns: template.is_some(),
        }
    }
}

/// Source of prompts, and output of replies.
struct Talk {
    dir: PathBuf,
    /// The single prompt of `--prompt`, until it is taken.
    prompt: Option<String>,
    chat: bool,
    json: bool,
    template: Option<ChatTemplate>,
    history: Vec<Message>,
}

impl Talk {
    fn new(args: GenerateArgs, template: Option<ChatTemplate>) -> Self {
        let system = args.system.map(|text| Message::new("system", text));
        Talk {
            dir: args.dir,
            prompt: args.prompt,
            chat: args.chat,
            json: args.json,
            template,
            history: system.into_iter().collect(),
        }
    }

    fn next(&mut self, reply: Option<&Reply>) -> Result<Option<Prompt>, GenerateError> {
        if let Some(reply) = reply {
            self.finish(reply);
        }
        let said = match self.chat {
            true => self.read()?,
            false => self.prompt.take(),
        };
        let Some(said) = said else { return Ok(None) };
        let Some(template) = &self.template else {
            return Ok(Some(Prompt {
                text: said,
                special_tokens: true,
            }));
        };
        self.history.push(Message::new("user", said));
        Ok(Some(Prompt {
            text: template.render(&self.history, true)?,
            special_tokens: !template.is_complete(),
        }))
    }

    fn finish(&mut self, reply: &Reply) {
        self.history.push(Message::new("assistant", &reply.text));
        if let Some(note) = self.note(reply) {
            log::note(&note);
        }
        if self.json {
            out(&format!("{}\n", record(reply)));
            return;
        }
        out("\n");
        let decode = match reply.decode_rate() {
            Some(rate) => format!(" at {rate:.1} tokens/s"),
            None => String::new(),
        };
        eprintln!(
            "{} prompt tokens at {:.1} tokens/s, {} new tokens{decode}",
            reply.prompt_tokens - reply.cached_tokens,
            reply.prompt_rate(),
            reply.tokens.len()
        );
    }

    /// Explains an empty reply.
    fn note(&self, reply: &Reply) -> Option<String> {
        if !reply.ended_at_once() {
            return None;
        }
        let token = format!(
            "{} ({})",
            reply.end_token.as_deref().unwrap_or_default(),
            reply.tokens.first()?
        );
        let own = || matches!(ChatTemplate::of(&self.dir), Ok(Some(_)));
        Some(match self.template.is_none() && own() {
            true => format!(
                "ended at once: the first token was the end token {token}; the model has a chat template, which \
                 --chat-template own or --chat applies"
            ),
            false => format!(
                "ended at once: the first token was the end token {token}; --ignore-eos continues past it"
            ),
        })
    }

    /// Reads the next line that is not empty.
    fn read(&self) -> Result<Option<String>, GenerateError> {
        loop {
            if io::stdin().is_terminal() {
                eprint!("> ");
            }
            let mut line = String::new();
            let read = io::stdin().lock().read_line(&mut line);
            match read.map_err(|source| GenerateError::Input { source })? {
                0 => return Ok(None),
                _ if line.trim().is_empty() => continue,
                _ => return Ok(Some(line.trim_end_matches(['\r', '\n']).to_owned())),
            }
        }
    }
}

/// Writes to standard output and flushes; errors are ignored, as the reader may have closed it.
fn out(text: &str) {
    let mut stdout = io::stdout();
    let _ = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
}

/// Returns a reply with its rates as JSON.
fn record(reply: &Reply) -> serde_json::Value {
    let mut record = json!(reply);
    record["prompt_tokens_per_second"] = json!(reply.prompt_rate());
    record["decode_tokens_per_second"] = json!(reply.decode_rate());
    record
}
