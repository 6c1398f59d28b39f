//! Removes private parts of a model's JSON before publication: local paths (`_name_or_path`,
//! `tokenizer_file`, any key), and `auto_map`, which names Python files that are not published.

use std::sync::LazyLock;

use fancy_regex::{Captures, Regex};
use serde_json::{Map, Value};

/// Keys whose values are free text of the model, such as a template or a token, and are kept.
const CONTENT: [&str; 4] = [
    "chat_template",
    "template",
    "content",
    "added_tokens_decoder",
];

/// Key that names Python files of the model's directory.
const AUTO_MAP: &str = "auto_map";

/// Matches a text that is a path: absolute with at least one directory, below a home directory, or
/// on a Windows drive or share.
static PATH: LazyLock<Regex> =
    LazyLock::new(|| regex(r"^(?:file://|/[^/\s]+/.|~[\w.-]*[/\\]|[A-Za-z]:[/\\]|\\\\[^\\])"));

/// Matches a path within a longer text, after a character that cannot be part of a URL or a
/// fraction.
static WITHIN: LazyLock<Regex> = LazyLock::new(|| {
    regex(
        r#"(^|[\s"'`=(,:;\[{<>|])(?:file://)?(?:(?:~[\w.-]*)?(?:/[\w.@+~-]+)+/|~[\w.-]*/|[A-Za-z]:[\\/](?:[\w.@+~ -]+[\\/])*)([\w.@+~-]*)"#,
    )
});

/// Matches a Hub id, which some keys may hold.
static HUB_ID: LazyLock<Regex> = LazyLock::new(|| regex(r"^\w[\w.-]*(?:/\w[\w.-]*)?$"));

fn regex(pattern: &str) -> Regex {
    #[allow(clippy::expect_used, reason = "the patterns are constants")]
    Regex::new(pattern).expect("a constant that parses")
}

fn fits(pattern: &Regex, text: &str) -> bool {
    // Patterns without look-around have no limits that could fail.
    pattern.is_match(text).unwrap_or(false)
}

/// Removed parts of a JSON object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TakenOut {
    /// Number of local paths.
    pub paths: usize,
    /// True if there was an `auto_map`.
    pub auto_map: bool,
}

impl TakenOut {
    /// Returns true if nothing was removed.
    pub fn is_nothing(self) -> bool {
        self == TakenOut::default()
    }
}

/// Removes private parts from `value`. An entry whose value is a path is removed with its key; a
/// path in a list or within a longer text is reduced to its last component.
pub fn make_public(value: &mut Value) -> TakenOut {
    let mut taken = TakenOut::default();
    clean(value, &mut taken);
    taken
}

fn clean(value: &mut Value, taken: &mut TakenOut) {
    match value {
        Value::Object(entries) => clean_entries(entries, taken),
        Value::Array(items) => items.iter_mut().for_each(|item| clean(item, taken)),
        Value::String(text) => {
            if let Some(short) = without_directories(text) {
                *text = short;
                taken.paths += 1;
            }
        }
        _ => {}
    }
}

fn clean_entries(entries: &mut Map<String, Value>, taken: &mut TakenOut) {
    if entries.remove(AUTO_MAP).is_some() {
        taken.auto_map = true;
    }
    let before = entries.len();
    entries.retain(|key, value| !is_local(key, value));
    taken.paths += before - entries.len();
    let content = |key: &str| CONTENT.contains(&key);
    let settings = entries.iter_mut().filter(|(key, _)| !content(key));
    settings.for_each(|(_, value)| clean(value, taken));
}

/// Returns true if an entry is a path, or about one.
fn is_local(key: &str, value: &Value) -> bool {
    if fits(&PATH, key) {
        return true;
    }
    let Some(text) = value.as_str().filter(|_| !CONTENT.contains(&key)) else {
        return false;
    };
    let named = ["_path", "_file", "_dir", "_directory", "_folder"];
    if key.ends_with("name_or_path") {
        return !text.is_empty() && !fits(&HUB_ID, text);
    }
    let named = named.iter().any(|end| key.ends_with(end));
    fits(&PATH, text) || named && text.starts_with(['/', '.', '~', '\\'])
}

/// Returns a text with the paths in it reduced to their last components; `None` if it has none.
pub fn without_directories(text: &str) -> Option<String> {
    if fits(&PATH, text) && !text.contains(char::is_whitespace) {
        let last = text
            .trim_end_matches(['/', '\\'])
            .rsplit(['/', '\\'])
            .next();
        return last.map(str::to_owned);
    }
    let short = WITHIN.replace_all(text, |found: &Captures<'_>| {
        let part = |n: usize| found.get(n).map_or("", |it| it.as_str());
        format!("{}{}", part(1), part(2))
    });
    (short != text).then(|| short.into_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn paths_of_a_machine_go_whatever_their_key() {
        let mut config = json!({
            "_name_or_path": "/home/someone/secret-project/llama",
            "name_or_path": "../runs/7",
            "tokenizer_file": "/root/.cache/huggingface/tokenizer.json",
            "vocab_file": "/vocab.json",
            "home": "~/models/x",
            "drive": "C:\\Users\\someone\\model",
            "drive_too": "D:/models/x",
            "share": "\\\\server\\share\\x",
            "url": "file:///mnt/data/x",
            "spaced": "/home/some one/my model",
            "/home/someone/adapter": 1,
            "inner": {"offload_to_disk_path": "/tmp/x", "list": ["/data/me/a.json", "b"]},
            "command": "python train.py --data=/data/me/rows.json --out '/data/me/out' ~/x.py",
            "log": "saved (C:\\Users\\me\\m.bin)",
        });
        let taken = make_public(&mut config);
        let expected = json!({
            "inner": {"list": ["a.json", "b"]},
            "command": "python train.py --data=rows.json --out 'out' x.py",
            "log": "saved (m.bin)",
        });
        assert_eq!(config, expected);
        assert!(taken.paths >= 14 && !taken.auto_map, "{taken:?}");
    }

    #[test]
    fn what_only_looks_like_a_path_stays() {
        let all = json!({
            "_name_or_path": "meta-llama/Llama-2-7b-hf",
            "base_model_name_or_path": "gpt2",
            "name_or_path": "",
            "eos_token": "</s>", "bos_token": "/s", "unk_token": {"content": "/a/b/c"},
            "sep": "//", "slash": "/", "pattern": "a/b/c", "date": "1/2/2026",
            "license_link": "https://huggingface.co/a/b/blob/main/LICENSE",
            "chat_template": "{{ '/home/x/y' }}",
            "added_tokens_decoder": {"3": {"content": "/usr/bin"}},
            "extra_special_tokens": ["[/INST]", "/think", "<|a|>"],
            "text": "on/off, yes / no, n/a.", "ratio": 0.5, "none": null
        });
        let mut kept = all.clone();
        assert!(make_public(&mut kept).is_nothing());
        assert_eq!(kept, all);
    }

    #[test]
    fn auto_map_goes_as_its_files_do() {
        let mut config =
            json!({"auto_map": {"AutoConfig": "configuration_x.XConfig"}, "a": {"auto_map": 1}});
        let taken = make_public(&mut config);
        assert_eq!((config, taken.auto_map), (json!({"a": {}}), true));
    }
}
