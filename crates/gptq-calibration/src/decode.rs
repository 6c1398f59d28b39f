//! Decodes tokens to text one at a time, without splitting characters that span tokens.
//!
//! A tokenizer's decoder may depend on a token's neighbours (a leading space is dropped at the
//! start of a text; bytes join to characters), so each token is decoded together with those before
//! it, and only the added text is returned.

use tokenizers::Tokenizer;

use crate::CalibrationError;

/// Prompt tokens kept as context for the first new one.
const CONTEXT: usize = 8;
/// Tokens that an incomplete character may span: a character has at most four bytes.
const LONGEST_CHARACTER: usize = 4;

/// Decodes a stream of tokens to a stream of text.
pub struct TextDecoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens returned last, then those waiting for the rest of a character.
    window: Vec<u32>,
    /// Number of tokens already returned, and their text.
    given: usize,
    text: String,
}

impl<'a> TextDecoder<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, prompt: &[u32]) -> Result<Self, CalibrationError> {
        let (_, last) = prompt.split_at(prompt.len().saturating_sub(CONTEXT));
        let window = last.to_vec();
        Ok(TextDecoder {
            tokenizer,
            given: window.len(),
            text: tokenizer
                .decode(&window, true)
                .map_err(CalibrationError::tokenizer)?,
            window,
        })
    }

    /// Returns the text that a further token adds: empty while a character is incomplete, and for
    /// special tokens.
    ///
    /// # Errors
    /// A token that the tokenizer cannot decode.
    pub fn push(&mut self, token: u32) -> Result<String, CalibrationError> {
        self.window.push(token);
        let decode = |ids: &[u32]| {
            self.tokenizer
                .decode(ids, true)
                .map_err(CalibrationError::tokenizer)
        };
        let text = decode(&self.window)?;
        let waiting = self.window.len() - self.given;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && waiting < LONGEST_CHARACTER {
            return Ok(String::new());
        }
        let common = text
            .chars()
            .zip(self.text.chars())
            .take_while(|(a, b)| a == b)
            .map(|(c, _)| c.len_utf8())
            .sum();
        // End of a character shared by both.
        let new = text.get(common..).unwrap_or_default().to_owned();
        if new.is_empty() {
            // A special token adds no context: the words before it are kept.
            self.given = self.window.len();
            return Ok(new);
        }
        self.window.drain(..self.given);
        self.given = self.window.len();
        self.text = decode(&self.window)?;
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use crate::TextTokenizer;

    fn tokenizer() -> TextTokenizer {
        let dir: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../../tests/models/medi-tiny"]
            .iter()
            .collect();
        TextTokenizer::load(&dir).unwrap()
    }

    #[test]
    fn pieces_join_to_the_text_and_no_character_is_broken() {
        let tokenizer = tokenizer();
        let text = "Asthma  is a disease: 37,5 °C – naïve 🫁 lungs, 咳嗽.\n Two lines";
        let tokens = tokenizer.encode(text, false).unwrap();
        let mut decoder = tokenizer.decoder(&tokens[..1]).unwrap();
        let pieces: Vec<String> = tokens[1..]
            .iter()
            .map(|&token| decoder.push(token).unwrap())
            .collect();
        assert!(
            pieces.iter().any(String::is_empty),
            "some bytes had to wait"
        );
        assert!(!pieces.concat().contains(char::REPLACEMENT_CHARACTER));
        assert!(text.ends_with(&pieces.concat()), "{pieces:?}");
        assert!(pieces.concat().len() > text.len() - 8, "{pieces:?}");
    }

    #[test]
    fn the_first_word_after_a_prompt_keeps_its_space() {
        let tokenizer = tokenizer();
        let prompt = tokenizer.encode("Diabetes", true).unwrap();
        let word = tokenizer.encode(" is", false).unwrap();
        let mut decoder = tokenizer.decoder(&prompt).unwrap();
        let text: String = word.iter().map(|&t| decoder.push(t).unwrap()).collect();
        assert_eq!(text.trim_start(), "is");
        assert!(text.starts_with(' '));
    }

    #[test]
    fn a_word_after_a_special_token_keeps_its_space() {
        let tokenizer = tokenizer();
        // The tokenizer itself begins each stretch of text with a space.
        let tokens = tokenizer
            .encode("a cough.</s><s>What is it", false)
            .unwrap();
        let mut decoder = tokenizer.decoder(&tokens[..1]).unwrap();
        let text: String = (tokens[1..].iter())
            .map(|&token| decoder.push(token).unwrap())
            .collect();
        assert!(text.ends_with("cough. What is it"), "{text:?}");
    }

    #[test]
    fn bytes_that_make_no_character_are_given_out_in_the_end() {
        let tokenizer = tokenizer();
        // The byte 0xF0 begins a character of four bytes that never becomes complete.
        let open = tokenizer.encode("🫁", false).unwrap();
        let byte = *open.iter().rev().nth(3).unwrap();
        let mut decoder = tokenizer.decoder(&[]).unwrap();
        let pieces: String = (0..5).map(|_| decoder.push(byte).unwrap()).collect();
        assert!(pieces.contains(char::REPLACEMENT_CHARACTER), "{pieces:?}");
    }
}
