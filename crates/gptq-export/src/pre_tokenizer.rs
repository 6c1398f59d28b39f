//! The name under which llama.cpp has a byte-level tokenizer's way of splitting text before merges.
//!
//! A GGUF file has no expressions, only a name of llama.cpp's list (`llama-vocab.cpp`), so the tokenizer must split by the
//! expressions that stand behind one.

use serde_json::Value;

/// Expressions of Llama 3 and of OpenAI's `cl100k_base`, in both spellings in use.
const THREE_DIGITS: [&str; 2] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
];

/// Expression of Qwen 2.
const ONE_DIGIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Expression of Mistral's tekken.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Returns true if a tokenizer splits text into bytes, each written as one character.
pub(crate) fn is_byte_level(tokenizer: &Value) -> bool {
    steps(tokenizer)
        .iter()
        .any(|step| step["type"] == "ByteLevel")
}

/// Returns the name for the tokenizer in `tokenizer.json`; `None` if llama.cpp has none.
pub(crate) fn pre_tokenizer(tokenizer: &Value) -> Option<&'static str> {
    let steps = steps(tokenizer);
    let own = |step: &Value| step["use_regex"] != false;
    match steps[..] {
        [bytes] if own(bytes) => Some("gpt-2"),
        [digits, bytes] if digits["type"] == "Digits" => {
            (own(bytes) && digits["individual_digits"] == true).then_some("smollm")
        }
        [split, bytes] if split["type"] == "Split" && !own(bytes) => {
            let expression = split["pattern"]["Regex"].as_str()?;
            // llama.cpp takes whole words that are tokens as they are under the first name only.
            let whole = tokenizer["model"]["ignore_merges"] == true;
            match expression {
                it if THREE_DIGITS.contains(&it) && whole => Some("llama-bpe"),
                it if THREE_DIGITS.contains(&it) => Some("dbrx"),
                ONE_DIGIT => Some("qwen2"),
                TEKKEN => Some("tekken"),
                _ => None,
            }
        }
        _ => None,
    }
}

/// Returns the steps of the pre-tokenizer.
fn steps(tokenizer: &Value) -> Vec<&Value> {
    let whole = &tokenizer["pre_tokenizer"];
    match whole["pretokenizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None if whole.is_null() => Vec::new(),
        None => vec![whole],
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn known_ways_of_splitting_have_their_names() {
        let bytes =
            |own: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": own});
        let split = |expression: &str| json!({"type": "Split", "pattern": {"Regex": expression}});
        let with = |steps: Value, whole: bool| {
            json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
                "model": {"type": "BPE", "ignore_merges": whole}})
        };
        let digits = json!({"type": "Digits", "individual_digits": true});
        for (tokenizer, expected) in [
            (json!({"pre_tokenizer": bytes(true)}), Some("gpt-2")),
            (with(json!([digits, bytes(true)]), false), Some("smollm")),
            (
                with(json!([split(THREE_DIGITS[0]), bytes(false)]), true),
                Some("llama-bpe"),
            ),
            (
                with(json!([split(THREE_DIGITS[1]), bytes(false)]), false),
                Some("dbrx"),
            ),
            (
                with(json!([split(ONE_DIGIT), bytes(false)]), false),
                Some("qwen2"),
            ),
            (
                with(json!([split(TEKKEN), bytes(false)]), false),
                Some("tekken"),
            ),
            (with(json!([split("x"), bytes(false)]), false), None),
            (with(json!([split(ONE_DIGIT), bytes(true)]), false), None),
        ] {
            assert!(is_byte_level(&tokenizer));
            assert_eq!(pre_tokenizer(&tokenizer), expected, "{tokenizer}");
        }
        assert!(!is_byte_level(&json!({"pre_tokenizer": null})));
    }
}
