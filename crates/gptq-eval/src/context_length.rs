//! Tokens that a model takes at once, as lm-evaluation-harness finds it (`resolve_max_length` in `models/utils.py`).

use std::path::Path;

use gptq_format::{FormatError, read_json};
use serde_json::Value;

/// Length that is assumed if no file has one.
const DEFAULT: usize = 2048;

/// Keys of `config.json`, in the order in which they count.
const KEYS: [&str; 3] = ["n_positions", "max_position_embeddings", "n_ctx"];

/// Returns the number of tokens that the model in `dir` takes at once: of its `config.json`, there of `text_config` if it has
/// one, else of `tokenizer_config.json`.
///
/// # Errors
/// A `config.json` that cannot be read.
pub fn context_length(dir: &Path) -> Result<usize, FormatError> {
    let config: Value = read_json(&dir.join("config.json"))?;
    let text = config.get("text_config").filter(|it| it.is_object());
    let text = text.unwrap_or(&config);
    let number = |value: &Value| usize::try_from(value.as_u64()?).ok();
    let own = KEYS.iter().find_map(|key| number(text.get(key)?));
    // Whatever is wrong with the tokenizer's config, its reader says.
    let tokenizer = || {
        let path = dir.join("tokenizer_config.json");
        let config: Value = read_json(&path).ok()?;
        number(config.get("model_max_length")?)
    };
    Ok(own.or_else(tokenizer).filter(|n| *n > 0).unwrap_or(DEFAULT))
}
