//! Added tokens of the files beside `tokenizer.json`, merged in as by Transformers 5.
//!
//! | file | what it says |
//! |---|---|
//! | `tokenizer_config.json` | `added_tokens_decoder` (by id), `bos_token` and the like, any other key that ends with `_token`, `extra_special_tokens` or `additional_special_tokens` |
//! | `special_tokens_map.json` | the same keys; they win, but are read only where there is no `added_tokens_decoder` |
//! | `added_tokens.json` | a text and its id; read only where there is no `added_tokens_decoder` |
//!
//! A token in the vocabulary keeps its id; others get the next free ids, in the order of this
//! table.
//!
//! Source: `_from_pretrained` in `tokenization_utils_base.py`, and `TokenizersBackend.__init__` in
//! `tokenization_utils_tokenizers.py`, in Transformers 5.23.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use tokenizers::{AddedToken, Tokenizer};

use crate::CalibrationError;
use crate::tokenizer_class::Class;

/// Named special tokens common to all classes, in the order in which they are added.
const NAMED: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

/// Tokens named by the files beside `tokenizer.json`.
#[derive(Debug, Default)]
pub(crate) struct AddedTokens {
    /// Tokens by name, such as `eos_token`.
    named: Vec<(String, AddedToken)>,
    /// Special tokens without a name.
    extra: Vec<AddedToken>,
    /// Tokens by the id assigned to them.
    by_id: BTreeMap<u32, AddedToken>,
    /// True if `by_id` is the complete list, and the tokenizer file's own tokens are not read.
    is_whole: bool,
}

impl AddedTokens {
    /// Collects the tokens of the three files; each is null if missing.
    pub(crate) fn new(class: Class, config: &Value, map: &Value, added: &Value) -> Self {
        let declared = config
            .get("added_tokens_decoder")
            .and_then(Value::as_object);
        let mut keys = config.as_object().cloned().unwrap_or_default();
        let has_extra = keys.get("extra_special_tokens").is_some_and(is_given);
        if let Some(additional) = keys.remove("additional_special_tokens")
            && !has_extra
        {
            keys.insert("extra_special_tokens".into(), additional);
        }
        if let (None, Some(map)) = (declared, map.as_object()) {
            merge(&mut keys, map);
        }
        let mut tokens = AddedTokens {
            is_whole: declared.is_some(),
            ..AddedTokens::default()
        };
        for name in NAMED {
            let value = keys.remove(name);
            let default = class.defaults().iter().find(|(key, _)| *key == name);
            let token = match (value, default) {
                (Some(value), _) => token(&value),
                (None, default) => default.map(|(_, text)| AddedToken::from(*text, true)),
            };
            tokens
                .named
                .extend(token.map(|token| (name.to_owned(), token)));
        }
        let of_class = class
            .defaults()
            .iter()
            .filter(|(name, _)| !NAMED.contains(name));
        for (name, text) in of_class {
            let token = match keys.remove(*name) {
                Some(value) => token(&value),
                None => Some(AddedToken::from(*text, true)),
            };
            tokens.extra.extend(token);
        }
        let extra = keys.remove("extra_special_tokens");
        let own = keys.iter().filter(|(key, _)| key.ends_with("_token"));
        let own = own.filter_map(|(key, value)| Some((key.clone(), token(value)?)));
        tokens.named.extend(own);
        match extra {
            Some(Value::Object(extra)) => {
                let extra = extra
                    .iter()
                    .filter_map(|(key, value)| Some((key.clone(), token(value)?)));
                tokens.named.extend(extra);
            }
            Some(Value::Array(extra)) => tokens.extra.extend(extra.iter().filter_map(token)),
            _ => {}
        }
        match declared {
            Some(declared) => {
                let by_id = declared.iter();
                let by_id =
                    by_id.filter_map(|(id, value)| Some((id.parse().ok()?, object(value)?)));
                tokens.by_id.extend(by_id);
            }
            None => tokens.add_listed(added),
        }
        tokens
    }

    /// Adds the tokens of `added_tokens.json`.
    fn add_listed(&mut self, added: &Value) {
        let special: Vec<&str> = self.special().map(|token| token.content.as_str()).collect();
        let listed = added.as_object().into_iter().flatten();
        let by_id = listed.filter_map(|(text, id)| {
            let id = u32::try_from(id.as_u64()?).ok()?;
            Some((
                id,
                AddedToken::from(text.as_str(), special.contains(&text.as_str())),
            ))
        });
        self.by_id = by_id.collect();
    }

    fn special(&self) -> impl Iterator<Item = &AddedToken> {
        self.named.iter().map(|(_, token)| token).chain(&self.extra)
    }

    /// Returns a special token by its name.
    pub(crate) fn named(&self, name: &str) -> Option<&str> {
        let mut named = self.named.iter();
        named
            .find(|(key, _)| key == name)
            .map(|(_, token)| token.content.as_str())
    }

    /// Adds the tokens to `tokenizer`, which was built as `class`; `filed` are those of
    /// `tokenizer.json`.
    pub(crate) fn add_to(
        &self,
        tokenizer: &mut Tokenizer,
        class: Class,
        filed: &BTreeMap<u32, AddedToken>,
    ) -> Result<(), CalibrationError> {
        let mut by_id = self.by_id.clone();
        if !self.is_whole {
            by_id.extend(filed.iter().map(|(id, token)| (*id, token.clone())));
        }
        let there = tokenizer.get_added_tokens_decoder();
        let mut known: Vec<String> = there.values().map(|token| token.content.clone()).collect();
        let mut add: Vec<AddedToken> = Vec::new();
        for token in by_id.into_values() {
            if !there.values().any(|other| *other == token) {
                known.push(token.content.clone());
                add.push(token);
            }
        }
        for token in self.special() {
            if !known.contains(&token.content) {
                known.push(token.content.clone());
                add.push(token.clone());
            }
        }
        for token in &mut add {
            token.special |= self
                .named
                .iter()
                .any(|(_, named)| named.content == token.content);
        }
        tokenizer
            .add_tokens(add)
            .map_err(CalibrationError::tokenizer)?;
        if class == Class::Qwen2 {
            // This class adds its special tokens once more, without flags.
            let plain = self
                .special()
                .map(|token| AddedToken::from(token.content.as_str(), true));
            let plain: Vec<AddedToken> = plain.collect();
            tokenizer
                .add_tokens(plain)
                .map_err(CalibrationError::tokenizer)?;
        }
        Ok(())
    }
}

/// Merges the keys of `special_tokens_map.json` into `keys`.
fn merge(keys: &mut Map<String, Value>, map: &Map<String, Value>) {
    for (key, value) in map {
        match (key.as_str(), value) {
            ("additional_special_tokens", value) => {
                keys.entry("extra_special_tokens")
                    .or_insert_with(|| value.clone());
            }
            ("extra_special_tokens", Value::Array(more)) => {
                let mut all = match keys.remove(key) {
                    Some(Value::Array(all)) => all,
                    _ => Vec::new(),
                };
                let new = more
                    .iter()
                    .map(special)
                    .filter(|token| !all.contains(token));
                let new: Vec<Value> = new.collect();
                all.extend(new);
                keys.insert(key.clone(), all.into());
            }
            _ => {
                keys.insert(key.clone(), special(value));
            }
        }
    }
}

/// Returns the same token, marked as special.
fn special(value: &Value) -> Value {
    let mut value = value.clone();
    if let Some(flags) = value
        .as_object_mut()
        .filter(|flags| flags.contains_key("content"))
    {
        flags.insert("special".into(), true.into());
    }
    value
}

/// Returns the truth value that Python gives it.
fn is_given(value: &Value) -> bool {
    match value {
        Value::Array(list) => !list.is_empty(),
        Value::Object(keys) => !keys.is_empty(),
        other => !other.is_null(),
    }
}

/// Parses a special token: a string, or an object with `content`.
fn token(value: &Value) -> Option<AddedToken> {
    match value {
        Value::String(text) => Some(AddedToken::from(text.as_str(), true)),
        other => object(other),
    }
}

/// Parses a token with its flags, which default to off; a token that is not special is normalized.
fn object(value: &Value) -> Option<AddedToken> {
    let content = value.get("content")?.as_str()?;
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = flag("special").unwrap_or(false);
    Some(AddedToken {
        content: content.to_owned(),
        single_word: flag("single_word").unwrap_or(false),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        normalized: flag("normalized").unwrap_or(!special),
        special,
    })
}
