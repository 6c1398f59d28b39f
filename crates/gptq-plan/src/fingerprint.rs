//! Inputs and settings that determine a branch's bytes, by key: a run uses them to recognize its
//! own files in the output directory.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Maximum number of differences listed in a message.
const NAMED: usize = 3;
/// Maximum number of characters of a value in a message.
const SHOWN: usize = 60;

/// Dotted keys, and their values as JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(BTreeMap<String, String>);

impl Fingerprint {
    /// Returns the fingerprint of one value, under `key`.
    pub fn of(key: &str, value: &impl Serialize) -> Self {
        let mut print = Fingerprint::default();
        let value = serde_json::to_value(value);
        print.add(key, &value.expect("plain values always serialize"));
        print
    }

    /// Adds the leaves of `value`.
    pub fn add(&mut self, key: &str, value: &Value) {
        match value {
            Value::Object(entries) => {
                for (name, value) in entries {
                    self.add(&format!("{key}.{name}"), value);
                }
            }
            Value::Array(values) => {
                for (i, value) in values.iter().enumerate() {
                    self.add(&format!("{key}.{i}"), value);
                }
            }
            leaf => {
                self.0.insert(key.to_owned(), leaf.to_string());
            }
        }
    }

    /// Returns the text under a key.
    pub fn text(&self, key: &str) -> Option<String> {
        serde_json::from_str(self.0.get(key)?).ok()
    }

    /// Returns the fingerprint without one key.
    pub fn without(mut self, key: &str) -> Self {
        self.0.remove(key);
        self
    }

    /// Describes the differences in half a line; `None` if there are none.
    pub fn difference(&self, now: &Fingerprint) -> Option<String> {
        let keys: Vec<&String> = (self.0.keys())
            .chain(now.0.keys().filter(|key| !self.0.contains_key(*key)))
            .filter(|&key| self.0.get(key) != now.0.get(key))
            .collect();
        let show = |values: &Fingerprint, key: &String| match values.0.get(key) {
            None => "not set".to_owned(),
            Some(value) => value.chars().take(SHOWN).collect(),
        };
        // List entries are numbered in keys, and shown by name.
        let name = |key: &str| {
            let (entry, _) = key.rsplit_once('.')?;
            let name = self.0.get(&format!("{entry}.name"))?.trim_matches('"');
            Some(format!(" ({name})")).filter(|_| entry.ends_with(|c: char| c.is_ascii_digit()))
        };
        let named = keys.iter().take(NAMED).map(|key| {
            let (then, now) = (show(self, key), show(now, key));
            let name = name(key).unwrap_or_default();
            format!("{key}{name} was {then}, is {now}")
        });
        let mut named: Vec<String> = named.collect();
        match keys.len() {
            0 => None,
            n => {
                if n > NAMED {
                    named.push(format!("and {} more", n - NAMED));
                }
                Some(named.join("; "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(value: Value) -> Fingerprint {
        let mut print = Fingerprint::default();
        print.add("branch", &value);
        print
    }

    #[test]
    fn differences_are_named_by_key() {
        let one = of(json!({"bits": 4, "damp": 0.1, "overrides": [{"pattern": "*"}]}));
        assert_eq!(one.difference(&one), None);
        let two = of(json!({"bits": 8, "damp": 0.1}));
        assert_eq!(
            one.difference(&two).unwrap(),
            "branch.bits was 4, is 8; branch.overrides.0.pattern was \"*\", is not set"
        );
        let file = |hash: &str| of(json!({"files": [{"name": "rows.json", "sha256": hash}]}));
        assert_eq!(
            file("a").difference(&file("b")).unwrap(),
            "branch.files.0.sha256 (rows.json) was \"a\", is \"b\""
        );
        let many = |n: usize| of(json!(vec![n; 5]));
        assert!(
            many(1)
                .difference(&many(2))
                .unwrap()
                .ends_with("and 2 more")
        );
    }
}
