//! A model's own tokenizer, from the `tokenizer.json` beside it.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use tokenizers::Tokenizer;

use crate::chat::special_token;
use crate::rendering::Document;
use crate::small_file::{self, MAX_TOKENIZER};
use crate::{CalibrationError, TextDecoder, source};

/// Encodes documents: the tokenizer's own special tokens, then the end token after each document.
pub struct TextTokenizer {
    dir: PathBuf,
    tokenizer: Tokenizer,
    /// Asked for where text is encoded: token ids need none.
    end: Option<u32>,
    sha256: String,
}

impl TextTokenizer {
    /// Loads `tokenizer.json` and the end token that `tokenizer_config.json` names, or else
    /// `special_tokens_map.json`.
    pub fn load(dir: &Path) -> Result<Self, CalibrationError> {
        let path = dir.join("tokenizer.json");
        let bytes = small_file::read(&path, MAX_TOKENIZER).map_err(|error| {
            // What tokenizers were saved as before there was tokenizer.json.
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
        let mut tokenizer =
            Tokenizer::from_bytes(&bytes).map_err(|e| CalibrationError::Malformed {
                path,
                reason: e.to_string(),
            })?;
        // A file may carry the truncation and padding of whoever saved it.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(failed)?;
        let end = end_token(dir, &tokenizer)?;
        Ok(TextTokenizer {
            dir: dir.into(),
            tokenizer,
            end,
            sha256: source::sha256(&bytes),
        })
    }

    /// SHA-256 of `tokenizer.json`.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// The directory it was loaded from.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A text as tokens, with the tokenizer's own special tokens around it if asked for; those that
    /// the text spells out are recognised either way.
    pub fn encode(&self, text: &str, special_tokens: bool) -> Result<Vec<u32>, CalibrationError> {
        let encoding = self.tokenizer.encode_fast(text, special_tokens);
        Ok(encoding.map_err(failed)?.get_ids().to_vec())
    }

    /// Tokens as text, special tokens included.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, CalibrationError> {
        self.tokenizer.decode(tokens, false).map_err(failed)
    }

    /// Text of tokens that come one by one after `prompt`.
    pub fn decoder(&self, prompt: &[u32]) -> Result<TextDecoder<'_>, CalibrationError> {
        TextDecoder::new(&self.tokenizer, prompt)
    }

    /// All documents encoded, each followed by the end token, joined.
    pub fn join(&self, documents: Vec<String>) -> Result<Vec<u32>, CalibrationError> {
        let documents = documents.into_iter().map(Document::Text).collect();
        Ok(self.encode_all(documents)?.concat())
    }

    /// Each document's tokens, in order; encoded in parallel.
    pub(crate) fn encode_all(
        &self,
        documents: Vec<Document>,
    ) -> Result<Vec<Vec<u32>>, CalibrationError> {
        let encode = |document| match document {
            Document::Tokens(ids) => Ok(ids),
            Document::Complete(text) => self.encode(&text, false),
            Document::Text(text) => {
                let mut ids = self.encode(&text, true)?;
                let end = self.end;
                ids.push(end.ok_or_else(|| CalibrationError::NoEndToken {
                    dir: self.dir.clone(),
                })?);
                Ok(ids)
            }
        };
        documents.into_par_iter().map(encode).collect()
    }
}

pub(crate) fn failed(error: tokenizers::Error) -> CalibrationError {
    CalibrationError::Tokenizer {
        reason: error.to_string(),
    }
}

/// The first `eos_token` of the vocabulary: a string, or an object with `content`.
fn end_token(dir: &Path, tokenizer: &Tokenizer) -> Result<Option<u32>, CalibrationError> {
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let config = small_file::config(dir, name)?;
        let token = config.get("eos_token").and_then(special_token);
        let id = token.and_then(|token| tokenizer.token_to_id(&token));
        if id.is_some() {
            return Ok(id);
        }
    }
    Ok(None)
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
        assert_eq!(ends(), Ok(Some(1)), "the config comes first");
        write("special_tokens_map.json", "{}");
        write("tokenizer_config.json", r#"{"eos_token": "<|nowhere|>"}"#);
        assert!(
            refused().contains("special_tokens_map.json"),
            "{}",
            refused()
        );
    }

    #[test]
    fn any_number_of_threads_gives_the_tokens_of_one_by_one() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let tokenizer = TextTokenizer::load(&root.join("tests/models/medi-tiny")).unwrap();
        // Documents of very different lengths: those that end early must not come early.
        let text = |at: usize| format!("{at} fever and cough; ").repeat(1 + at * 37 % 200);
        let documents = || (0..400).map(|at| Document::Text(text(at))).collect();
        let pool = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap()
        };
        let one_by_one: Vec<Vec<u32>> = (0..400)
            .map(|at| {
                let mut ids = tokenizer.encode(&text(at), true).unwrap();
                ids.push(tokenizer.end.unwrap());
                ids
            })
            .collect();
        for threads in [1, 2, 7] {
            let encoded = pool(threads).install(|| tokenizer.encode_all(documents()));
            assert!(encoded.unwrap() == one_by_one, "{threads} threads differ");
        }
    }
}
