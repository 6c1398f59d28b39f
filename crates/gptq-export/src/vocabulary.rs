//! A tokenizer as the metadata of a GGUF file: `tokenizer.ggml.*` and the chat template.
//!
//! Byte-level tokenizers go out as `gpt2`, with merges and the name of their way of splitting; those of SentencePiece as
//! `llama`, with a score for each token, the highest of which llama.cpp merges first. Scores are those of
//! `tokenizer.model`; where that is missing, the order of the merges in `tokenizer.json` gives them, as it does in Llama's.

use std::collections::BTreeMap;
use std::path::Path;

use gptq_format::{GgufValue, read_json, read_json_within, side_file};
use gptq_spec::GgufEntry;
use serde_json::Value;

use crate::ExportError;
use crate::pre_tokenizer::{is_byte_level, pre_tokenizer};
use crate::sentencepiece::pieces;

/// Most bytes of `tokenizer.json`.
const MAX_TOKENIZER: u64 = 128 << 20;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Score of tokens that were added to a vocabulary.
const ADDED: f32 = -1000.0;

/// Tokens by id.
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i32>,
    scores: Vec<f32>,
}

/// Returns the entries for the tokenizer in `dir` of a model with `vocabulary` tokens.
///
/// # Errors
/// No tokenizer, or one that llama.cpp does not have.
pub(crate) fn entries(dir: &Path, vocabulary: usize) -> Result<Vec<GgufEntry>, ExportError> {
    let refuse = |reason: String| ExportError::Tokenizer {
        dir: dir.into(),
        reason,
    };
    let path = dir.join("tokenizer.json");
    if !path.is_file() {
        return Err(refuse(
            "a gguf file holds the tokenizer; put tokenizer.json there".to_owned(),
        ));
    }
    let tokenizer: Value = read_json_within(&path, MAX_TOKENIZER)?;
    let settings: Value = match dir.join("tokenizer_config.json") {
        path if path.is_file() => read_json(&path)?,
        _ => Value::Null,
    };
    let model = &tokenizer["model"];
    let bytes = is_byte_level(&tokenizer);
    let mut tokens = match (bytes, side_file(dir, "tokenizer.model")?) {
        (false, Some(file)) => {
            let pieces = pieces(&file);
            let pieces = pieces
                .ok_or_else(|| refuse("tokenizer.model is no SentencePiece model".to_owned()))?;
            Tokens {
                texts: pieces.iter().map(|it| it.text.clone()).collect(),
                kinds: pieces.iter().map(|it| it.kind).collect(),
                scores: pieces.iter().map(|it| it.score).collect(),
            }
        }
        _ if model["type"] != "BPE" => {
            let kind = model["type"].as_str().unwrap_or("none");
            return Err(refuse(format!(
                "its tokenizer.json is of the kind {kind}, and llama.cpp needs tokenizer.model for that; put it there"
            )));
        }
        _ => merged(&tokenizer),
    };
    tokens.add(&tokenizer, &settings);
    if tokens.texts.len() > vocabulary {
        let count = tokens.texts.len();
        return Err(refuse(format!(
            "the tokenizer has {count} tokens, but the model's vocabulary is {vocabulary}; use the tokenizer that belongs to it"
        )));
    }
    tokens.fill(vocabulary);
    let mut all: Vec<GgufEntry> = Vec::new();
    let mut put = |key: &str, value: GgufValue| all.push((format!("tokenizer.{key}"), value));
    let text = |text: &str| GgufValue::Text(text.to_owned());
    let ids: BTreeMap<&str, u32> = (0..)
        .zip(&tokens.texts)
        .map(|(id, it)| (it.as_str(), id))
        .collect();
    if bytes {
        let name = pre_tokenizer(&tokenizer).ok_or_else(|| {
            refuse("its tokenizer splits text in a way that llama.cpp has no name for; export to another format".to_owned())
        })?;
        put("ggml.model", text("gpt2"));
        put("ggml.pre", text(name));
        put("ggml.merges", GgufValue::Texts(merges(&tokenizer)));
    } else {
        put("ggml.model", text("llama"));
        put("ggml.pre", text("default"));
        put(
            "ggml.add_space_prefix",
            GgufValue::Bool(prepends(&tokenizer)),
        );
        put("ggml.scores", GgufValue::F32s(tokens.scores.clone()));
    }
    let special = |key: &str| {
        let token = &settings[key];
        let token = token.as_str().or(token["content"].as_str());
        token.and_then(|token| ids.get(token)).copied()
    };
    let config: Value = read_json(&dir.join("config.json"))?;
    let told = |key: &str| {
        let id = &config[key];
        let id = id.as_u64().or(id[0].as_u64());
        id.and_then(|id| u32::try_from(id).ok())
            .filter(|id| (*id as usize) < vocabulary)
    };
    for (key, token, id) in [
        ("ggml.bos_token_id", "bos_token", "bos_token_id"),
        ("ggml.eos_token_id", "eos_token", "eos_token_id"),
        ("ggml.unknown_token_id", "unk_token", "unk_token_id"),
        ("ggml.padding_token_id", "pad_token", "pad_token_id"),
    ] {
        if let Some(id) = special(token).or(told(id)) {
            put(key, GgufValue::U32(id));
        }
    }
    for (key, setting, token, first) in [
        ("ggml.add_bos_token", "add_bos_token", "bos_token", true),
        ("ggml.add_eos_token", "add_eos_token", "eos_token", false),
    ] {
        let adds = settings[setting].as_bool();
        let adds = adds.unwrap_or_else(|| frames(&tokenizer, &settings[token], first));
        put(key, GgufValue::Bool(adds));
    }
    if let Some(template) = chat_template(dir, &settings)? {
        put("chat_template", GgufValue::Text(template));
    }
    put("ggml.token_type", GgufValue::I32s(tokens.kinds));
    put("ggml.tokens", GgufValue::Texts(tokens.texts));
    Ok(all)
}

impl Tokens {
    /// Adds the tokens beside the vocabulary.
    fn add(&mut self, tokenizer: &Value, settings: &Value) {
        let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
        let added = added.map(|it| (it["id"].as_u64(), it));
        let decoder = settings["added_tokens_decoder"]
            .as_object()
            .into_iter()
            .flatten();
        let decoder = decoder.map(|(id, it)| (id.parse().ok(), it));
        for (id, token) in decoder.chain(added) {
            // A number beyond this is in no vocabulary.
            let id = id.filter(|id| *id < 1 << 24).map(|id| id as usize);
            let (Some(id), Some(text)) = (id, token["content"].as_str()) else {
                continue;
            };
            self.fill(id + 1);
            if self.texts[id] == text && ![NORMAL, UNUSED].contains(&self.kinds[id]) {
                continue;
            }
            self.kinds[id] = match token["special"] == true {
                true => CONTROL,
                false => USER_DEFINED,
            };
            self.texts[id] = text.to_owned();
            self.scores[id] = ADDED;
        }
    }

    /// Fills up to `count` tokens.
    fn fill(&mut self, count: usize) {
        for id in self.texts.len()..count {
            self.texts.push(format!("[PAD{id}]"));
            self.kinds.push(UNUSED);
            self.scores.push(ADDED);
        }
    }
}

/// Tokens of a vocabulary of merges; where it has bytes of its own, with scores by the order of merges.
fn merged(tokenizer: &Value) -> Tokens {
    let model = &tokenizer["model"];
    let mut tokens = Tokens {
        texts: Vec::new(),
        kinds: Vec::new(),
        scores: Vec::new(),
    };
    let merges = merges(tokenizer);
    let mut ranks: BTreeMap<String, usize> = BTreeMap::new();
    for (rank, merge) in merges.iter().enumerate() {
        ranks.entry(merge.replacen(' ', "", 1)).or_insert(rank);
    }
    for (text, id) in model["vocab"].as_object().into_iter().flatten() {
        let Some(id) = id.as_u64().filter(|id| *id < 1 << 24) else {
            continue;
        };
        let id = id as usize;
        tokens.fill(id + 1);
        let byte = text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        tokens.kinds[id] = match text {
            _ if model["unk_token"] == text.as_str() => UNKNOWN,
            _ if byte => BYTE,
            _ => NORMAL,
        };
        tokens.scores[id] = match ranks.get(text) {
            Some(rank) => -(*rank as f32),
            None if tokens.kinds[id] == NORMAL => -(merges.len() as f32),
            None => 0.0,
        };
        tokens.texts[id] = text.clone();
    }
    tokens
}

/// The merges, each as two tokens with a space between them.
fn merges(tokenizer: &Value) -> Vec<String> {
    let merges = tokenizer["model"]["merges"]
        .as_array()
        .into_iter()
        .flatten();
    let text = |merge: &Value| match merge.as_str() {
        Some(text) => text.to_owned(),
        None => format!(
            "{} {}",
            merge[0].as_str().unwrap_or(""),
            merge[1].as_str().unwrap_or("")
        ),
    };
    merges.map(text).collect()
}

/// Returns true if a tokenizer puts a space before a text.
fn prepends(tokenizer: &Value) -> bool {
    let normalizer = &tokenizer["normalizer"];
    let one = [normalizer.clone()];
    let steps = normalizer["normalizers"].as_array();
    let steps = steps.map_or(&one[..], |steps| steps);
    let scheme = &tokenizer["pre_tokenizer"]["prepend_scheme"];
    steps.iter().any(|step| step["type"] == "Prepend") || scheme == "first" || scheme == "always"
}

/// Returns true if the tokenizer puts `token` before (`first`) or after a text.
fn frames(tokenizer: &Value, token: &Value, first: bool) -> bool {
    let token = token.as_str().or(token["content"].as_str());
    let processor = &tokenizer["post_processor"];
    let one = [processor.clone()];
    let all = processor["processors"]
        .as_array()
        .map_or(&one[..], |all| all);
    let template = all.iter().find_map(|it| it["single"].as_array());
    let end = template.and_then(|it| if first { it.first() } else { it.last() });
    let id = end.and_then(|it| it["SpecialToken"]["id"].as_str());
    token.is_some() && id == token
}

/// The chat template: a file of its own, or in the tokenizer's settings.
fn chat_template(dir: &Path, settings: &Value) -> Result<Option<String>, ExportError> {
    if let Some(file) = side_file(dir, "chat_template.jinja")? {
        return Ok(String::from_utf8(file).ok());
    }
    let template = &settings["chat_template"];
    let named = template.as_array().into_iter().flatten();
    let named = named.filter(|it| it["name"] == "default");
    let mut named = named.filter_map(|it| it["template"].as_str());
    Ok(template
        .as_str()
        .or_else(|| named.next())
        .map(str::to_owned))
}

#[cfg(test)]
mod tests;
