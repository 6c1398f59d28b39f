//! A model's own tokenizer, built from `tokenizer.json` and the files beside it like Transformers 5
//! builds it ([`Class`], [`AddedTokens`]).
//!
//! Longer than most: what each kind of tokenizer does at the ends of a document.

use std::fmt;
use std::path::{Path, PathBuf};

use gptq_format::sha256;
use rayon::prelude::*;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::added_tokens::AddedTokens;
use crate::lenient_json::mend;
use crate::rendering::Document;
use crate::small_file::{self, MAX_TOKENIZER};
use crate::token_rows::TokenRules;
use crate::tokenizer_class::Class;
use crate::{CalibrationError, TextDecoder};

/// Encodes documents: with the tokenizer's own special tokens, and the end token after each
/// document.
pub struct TextTokenizer {
    dir: PathBuf,
    tokenizer: Tokenizer,
    /// Tokenizer of the unchanged `tokenizer.json`, if Transformers builds a different one.
    filed: Option<Tokenizer>,
    /// Needed only to encode text; token ids do without.
    end: Option<SpecialToken>,
    beginning: Option<SpecialToken>,
    bos: Option<SpecialToken>,
    padding: Option<u32>,
    /// End tokens according to `config.json` and `generation_config.json`.
    model_ends: Vec<(&'static str, Vec<u32>)>,
    /// Size of the model's vocabulary, if `config.json` has it.
    vocabulary: Option<u32>,
    sha256: String,
}

/// A token and its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    /// Its text, such as `</s>`.
    pub text: String,
    /// Its id.
    pub id: u32,
}

/// Difference between `tokenizer.json` as it is and the tokenizer that Transformers 5 builds from
/// it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Number of documents whose tokens differ.
    pub documents: usize,
    /// Number of documents compared.
    pub of: usize,
    /// Tokens around the first difference, with Transformers 5.
    pub ours: String,
    /// The same with `tokenizer.json` as it is.
    pub filed: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference {
            documents,
            of,
            ours,
            filed,
        } = self;
        write!(
            f,
            "{documents} of the first {of} rows are tokenized as by Transformers 5, vLLM, SGLang and mlx-lm, \
             which rebuild this tokenizer; with tokenizer.json as it is (Transformers 4, llama.cpp) the tokens differ, \
             first {ours:?} instead of {filed:?}"
        )
    }
}

impl TextTokenizer {
    /// Loads `tokenizer.json` and the additions of `tokenizer_config.json`,
    /// `special_tokens_map.json` and `added_tokens.json`.
    ///
    /// # Errors
    /// A file that cannot be read, or is malformed.
    pub fn load(dir: &Path) -> Result<Self, CalibrationError> {
        let path = dir.join("tokenizer.json");
        let bytes = small_file::read(&path, MAX_TOKENIZER).map_err(|error| {
            // File formats of tokenizers from before `tokenizer.json`.
            let found = ["tokenizer.model", "vocab.json"];
            let found = found.into_iter().find(|name| dir.join(name).exists());
            match found.filter(|_| error.is_missing_file()) {
                Some(found) => CalibrationError::SlowTokenizer {
                    dir: dir.into(),
                    found,
                },
                None => error,
            }
        })?;
        let mut filed = Tokenizer::from_bytes(&bytes).map_err(|e| CalibrationError::Malformed {
            path,
            reason: e.to_string(),
        })?;
        // A file may contain the truncation and padding settings of its author.
        filed.with_padding(None);
        filed
            .with_truncation(None)
            .map_err(CalibrationError::tokenizer)?;
        let config = small_file::config(dir, "tokenizer_config.json")?;
        let map = small_file::config(dir, "special_tokens_map.json")?;
        let added = small_file::config(dir, "added_tokens.json")?;
        let model = ConfigFacts::read(dir);
        let class = config.get("tokenizer_class").and_then(Value::as_str);
        let class = Class::of(
            &model.model_type,
            class.or(model.tokenizer_class.as_deref()),
            &bytes,
        );
        let tokens = AddedTokens::new(class, &config, &map, &added);
        let rebuilt = class.rebuild(&filed, &config, tokens.named("unk_token"))?;
        let (mut tokenizer, mut filed) = match rebuilt {
            Some(rebuilt) => (rebuilt, Some(filed)),
            None => (filed, None),
        };
        let own = filed
            .as_ref()
            .unwrap_or(&tokenizer)
            .get_added_tokens_decoder();
        let own = own.into_iter().collect();
        tokens.add_to(&mut tokenizer, class, &own)?;
        if let Some(filed) = &mut filed {
            // Programs that use the file as it is know added tokens as well.
            let tokens = AddedTokens::new(Class::AsFiled, &config, &map, &added);
            tokens.add_to(filed, Class::AsFiled, &own)?;
        }
        if config.get("split_special_tokens") == Some(&Value::Bool(true)) {
            tokenizer.set_encode_special_tokens(true);
        }
        let find = |name: &str| {
            let text = tokens.named(name)?.to_owned();
            let id = tokenizer.token_to_id(&text)?;
            Some(SpecialToken { text, id })
        };
        let (own_beginning, own_end) = own_ends(&tokenizer)?;
        Ok(TextTokenizer {
            dir: dir.into(),
            end: find("eos_token").or(own_end),
            beginning: own_beginning,
            bos: find("bos_token"),
            padding: find("pad_token").map(|token| token.id).or(model.padding),
            model_ends: model.ends,
            vocabulary: model.vocabulary,
            sha256: sha256(&bytes),
            filed,
            tokenizer,
        })
    }

    /// Returns the SHA-256 of `tokenizer.json`.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Returns the directory it was loaded from.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the token that follows each document when documents are joined.
    pub fn end(&self) -> Option<&SpecialToken> {
        self.end.as_ref()
    }

    /// Returns the token that the tokenizer itself puts before a text.
    pub fn beginning(&self) -> Option<&SpecialToken> {
        self.beginning.as_ref()
    }

    /// Returns the token that is named `bos_token`, whether the tokenizer puts it before texts or not.
    pub fn bos(&self) -> Option<&SpecialToken> {
        self.bos.as_ref()
    }

    /// Warns if the model's end tokens do not include the one that joins documents.
    pub fn end_warning(&self) -> Option<String> {
        let SpecialToken { text, id } = self.end.as_ref()?;
        let other = self.model_ends.iter().filter(|(_, ids)| !ids.contains(id));
        let other: Vec<String> = other
            .map(|(file, ids)| {
                let tokens = ids.iter().map(|&id| match self.tokenizer.id_to_token(id) {
                    Some(text) => format!("{id} ({text:?})"),
                    None => id.to_string(),
                });
                format!("{file} {}", tokens.collect::<Vec<_>>().join(", "))
            })
            .collect();
        (!other.is_empty()).then(|| {
            format!(
                "the tokenizer ends documents with token {id} ({text:?}), but the model's end token differs: \
                 {}; documents are joined with the tokenizer's, which affects the results; if that is \
                 wrong, correct eos_token in tokenizer_config.json",
                other.join("; ")
            )
        })
    }

    /// Encodes a text, optionally with the tokenizer's own special tokens around it; special tokens
    /// written in the text are recognized either way.
    pub fn encode(&self, text: &str, special_tokens: bool) -> Result<Vec<u32>, CalibrationError> {
        encode(&self.tokenizer, text, special_tokens)
    }

    /// Decodes tokens, special tokens included.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, CalibrationError> {
        self.tokenizer
            .decode(tokens, false)
            .map_err(CalibrationError::tokenizer)
    }

    /// Returns a decoder for tokens that follow `prompt` one by one.
    pub fn decoder(&self, prompt: &[u32]) -> Result<TextDecoder<'_>, CalibrationError> {
        TextDecoder::new(&self.tokenizer, prompt)
    }

    /// Encodes all documents, each followed by one end token, and joins them.
    pub fn join(&self, documents: Vec<String>) -> Result<Vec<u32>, CalibrationError> {
        let documents = documents.into_iter().map(Document::Text).collect();
        Ok(self.encode_all(documents)?.concat())
    }

    /// Encodes documents in parallel; returns each one's tokens, in order.
    pub(crate) fn encode_all(
        &self,
        documents: Vec<Document>,
    ) -> Result<Vec<Vec<u32>>, CalibrationError> {
        let encode = |document| {
            let ids = self.encode_document(&self.tokenizer, document)?;
            let most = self.vocabulary.unwrap_or(u32::MAX);
            match ids.iter().find(|id| **id >= most) {
                Some(&id) => Err(CalibrationError::BeyondVocabulary {
                    dir: self.dir.clone(),
                    token: self.tokenizer.id_to_token(id).unwrap_or_default(),
                    id,
                    vocabulary: most,
                }),
                None => Ok(ids),
            }
        };
        documents.into_par_iter().map(encode).collect()
    }

    fn encode_document(
        &self,
        tokenizer: &Tokenizer,
        document: Document,
    ) -> Result<Vec<u32>, CalibrationError> {
        match document {
            Document::Tokens(ids) => Ok(ids),
            Document::Complete(text) => encode(tokenizer, &text, false),
            Document::Text(text) => {
                let mut ids = encode(tokenizer, &text, true)?;
                let end = self.end.as_ref().map(|end| end.id);
                let end = end.ok_or_else(|| CalibrationError::NoEndToken {
                    dir: self.dir.clone(),
                })?;
                // Some tokenizers add the end token themselves.
                if ids.last() != Some(&end) {
                    ids.push(end);
                }
                Ok(ids)
            }
        }
    }

    /// Compares the tokenizer that Transformers 5 builds with `tokenizer.json` as it is; `None` if
    /// they agree on all of `documents`.
    pub(crate) fn difference(
        &self,
        documents: &[Document],
    ) -> Result<Option<Difference>, CalibrationError> {
        let Some(filed) = &self.filed else {
            return Ok(None);
        };
        let mut found: Option<Difference> = None;
        for document in documents {
            let ours = self.encode_document(&self.tokenizer, document.clone())?;
            let theirs = self.encode_document(filed, document.clone())?;
            if ours == theirs {
                continue;
            }
            let found = found.get_or_insert_with(|| {
                let at = ours.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
                let around = |tokenizer: &Tokenizer, ids: &[u32]| {
                    let ids = ids.iter().skip(at.saturating_sub(1)).take(3);
                    let tokens = ids.map(|&id| tokenizer.id_to_token(id).unwrap_or_default());
                    tokens.collect::<Vec<_>>().join(" ")
                };
                Difference {
                    documents: 0,
                    of: documents.len(),
                    ours: around(&self.tokenizer, &ours),
                    filed: around(filed, &theirs),
                }
            });
            found.documents += 1;
        }
        Ok(found)
    }

    /// Returns the constraints on rows of token ids.
    pub(crate) fn token_rules(&self) -> TokenRules {
        let added = self.tokenizer.get_added_tokens_decoder().into_iter();
        TokenRules {
            vocabulary: self.vocabulary,
            padding: self.padding,
            end: self.end.as_ref().map(|end| end.id),
            special: added
                .filter(|(_, token)| token.special)
                .map(|(id, token)| (id, token.content))
                .collect(),
        }
    }
}

fn encode(
    tokenizer: &Tokenizer,
    text: &str,
    special_tokens: bool,
) -> Result<Vec<u32>, CalibrationError> {
    let encoding = tokenizer.encode_fast(text, special_tokens);
    Ok(encoding
        .map_err(CalibrationError::tokenizer)?
        .get_ids()
        .to_vec())
}

/// Returns the tokens that the post-processor puts before and after a text.
fn own_ends(
    tokenizer: &Tokenizer,
) -> Result<(Option<SpecialToken>, Option<SpecialToken>), CalibrationError> {
    let (with, without) = (
        encode(tokenizer, "a", true)?,
        encode(tokenizer, "a", false)?,
    );
    let at = with
        .windows(without.len().max(1))
        .position(|ids| ids == without);
    let token = |&id: &u32| {
        Some(SpecialToken {
            text: tokenizer.id_to_token(id)?,
            id,
        })
    };
    Ok(match at {
        Some(at) => {
            let (before, rest) = with.split_at(at);
            let behind = rest.get(without.len()..).unwrap_or_default();
            (
                before.first().and_then(token),
                behind.last().and_then(token),
            )
        }
        None => (None, None),
    })
}

/// Facts from the model's own configs, which are checked elsewhere: what cannot be read is ignored.
#[derive(Default)]
struct ConfigFacts {
    model_type: String,
    tokenizer_class: Option<String>,
    vocabulary: Option<u32>,
    padding: Option<u32>,
    ends: Vec<(&'static str, Vec<u32>)>,
}

impl ConfigFacts {
    fn read(dir: &Path) -> ConfigFacts {
        let read = |name: &str| {
            let bytes = small_file::read(&dir.join(name), small_file::MAX_CONFIG).ok()?;
            serde_json::from_slice::<Value>(&mend(&bytes).0).ok()
        };
        let config = read("config.json").unwrap_or_default();
        let generation = read("generation_config.json").unwrap_or_default();
        let text = |key: &str| config.get(key).and_then(Value::as_str).map(str::to_owned);
        let number = |key: &str| u32::try_from(config.get(key)?.as_u64()?).ok();
        let ends = [
            ("config.json", &config),
            ("generation_config.json", &generation),
        ];
        let ends = ends.map(|(file, config)| {
            let ids = match config.get("eos_token_id") {
                Some(Value::Array(ids)) => ids.as_slice(),
                Some(id) => std::slice::from_ref(id),
                None => &[],
            };
            let ids = ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok());
            (file, ids.collect::<Vec<_>>())
        });
        ConfigFacts {
            model_type: text("model_type").unwrap_or_default(),
            tokenizer_class: text("tokenizer_class"),
            vocabulary: number("vocab_size"),
            padding: number("pad_token_id"),
            ends: ends
                .into_iter()
                .filter(|(_, ids)| !ids.is_empty())
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokenizer_of_another_time_is_refused_with_how_to_convert_it() {
        let dir = tempfile::tempdir().unwrap();
        let error = || TextTokenizer::load(dir.path()).err().unwrap().to_string();
        assert!(error().contains("tokenizer.json: "), "{}", error());
        for name in ["vocab.json", "tokenizer.model"] {
            std::fs::write(dir.path().join(name), "").unwrap();
            let error = error();
            let path = dir.path().display();
            let remedy = format!("from_pretrained('{path}').save_pretrained('{path}')");
            assert!(error.contains(name) && error.contains(&remedy), "{error}");
        }
    }

    #[test]
    fn the_end_token_is_found_in_either_file_and_asked_for_where_there_is_text() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let tokenizer = root.join("tests/models/medi-tiny/tokenizer.json");
        std::fs::copy(tokenizer, dir.path().join("tokenizer.json")).unwrap();
        let ends = || {
            let tokenizer = TextTokenizer::load(dir.path()).unwrap();
            let ids = tokenizer.encode_all(vec![Document::Tokens(vec![5, 6])]);
            assert_eq!(ids.unwrap(), [[5, 6]], "taken as they are");
            let text = tokenizer.join(vec!["Hi".into()]);
            text.map(|ids| ids.last().copied())
                .map_err(|e| e.to_string())
        };
        let refused = || ends().unwrap_err();
        assert!(refused().contains("no end token"), "{}", refused());
        write(
            "special_tokens_map.json",
            r#"{"eos_token": {"content": "</s>"}}"#,
        );
        assert_eq!(ends(), Ok(Some(2)));
        write("tokenizer_config.json", r#"{"eos_token": null}"#);
        assert_eq!(ends(), Ok(Some(2)));
        write("tokenizer_config.json", r#"{"eos_token": "<s>"}"#);
        assert_eq!(
            ends(),
            Ok(Some(2)),
            "the map comes first, as in Transformers"
        );
        let decoder = r#"{"eos_token": "<s>", "added_tokens_decoder": {}}"#;
        write("tokenizer_config.json", decoder);
        assert_eq!(
            ends(),
            Ok(Some(1)),
            "but not beside an added_tokens_decoder"
        );
        // A token outside the vocabulary gets a new id, for which the model has no embedding row.
        write("special_tokens_map.json", "{}");
        write("tokenizer_config.json", r#"{"eos_token": "<|nowhere|>"}"#);
        write("config.json", r#"{"vocab_size": 4096}"#);
        let refused = refused();
        assert!(
            refused.contains("<|nowhere|>") && refused.contains("vocabulary of 4096"),
            "{refused}"
        );
    }

    #[test]
    fn any_number_of_threads_gives_the_tokens_of_one_by_one() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let tokenizer = TextTokenizer::load(&root.join("tests/models/medi-tiny")).unwrap();
        // Documents of very different lengths: those finished early must keep their places.
        let text = |at: usize| format!("{at} fever and cough; ").repeat(1 + at * 37 % 200);
        let documents = || (0..400).map(|at| Document::Text(text(at))).collect();
        let pool = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap()
        };
        let one_by_one: Vec<Vec<u32>> = (0..400)
            .map(|at| {
                let mut ids = tokenizer.encode(&text(at), true).unwrap();
                ids.push(tokenizer.end().unwrap().id);
                ids
            })
            .collect();
        for threads in [1, 2, 7] {
            let encoded = pool(threads).install(|| tokenizer.encode_all(documents()));
            assert!(encoded.unwrap() == one_by_one, "{threads} threads differ");
        }
    }
}
