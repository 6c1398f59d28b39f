//! Text to measure perplexity on.

use std::fs;
use std::path::Path;

use crate::{CalibrationError, TextTokenizer};

/// The joined tokens of an evaluation text: `.json` holds a list of texts, anything else is one
/// text. Errors when they do not fill a window.
pub fn evaluation_tokens(
    path: &Path,
    tokenizer: &TextTokenizer,
    window: usize,
) -> Result<Vec<u32>, CalibrationError> {
    let tokens = tokenizer.join(read_texts(path)?)?;
    if tokens.len() < window {
        return Err(CalibrationError::TooLittleEvaluation {
            available: tokens.len(),
            window,
        });
    }
    Ok(tokens)
}

/// Documents for evaluation: a JSON list of texts, or one plain text.
fn read_texts(path: &Path) -> Result<Vec<String>, CalibrationError> {
    let bytes = fs::read(path).map_err(CalibrationError::io(path))?;
    let malformed = |reason: String| CalibrationError::Malformed {
        path: path.into(),
        reason,
    };
    if path.extension().is_some_and(|e| e == "json") {
        return serde_json::from_slice(&bytes)
            .map_err(|e| malformed(format!("not a JSON list of texts: {e}")));
    }
    String::from_utf8(bytes)
        .map(|text| vec![text])
        .map_err(|_| malformed("not UTF-8 text".into()))
}
