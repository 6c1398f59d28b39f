//! `dynamic` of `quantize_config.json`: settings of single modules, by regular expressions on their
//! names.
//!
//! Interpreted as by GPTQModel: expressions are tried in file order at the beginning of the name,
//! and the first match counts. The prefix `-:` means "left in full precision", `+:` or none "with
//! these settings". The syntax is Python's, with look-around. Some clients match against tensor
//! names (`...down_proj.qweight`), so the expressions written here do not end in `$`.
//!
//! Limits: [`MAX_PATTERNS`] patterns of [`MAX_PATTERN`] bytes, [`MAX_COMPILED`] bytes each as
//! compiled, and [`MAX_STEPS`] backtracking steps per match.

use std::fmt;
use std::sync::OnceLock;

use fancy_regex::{CompileError, Error, Regex, RegexBuilder};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Bits, GroupSize};

pub(crate) const MAX_PATTERNS: usize = 256;
/// Maximum length of a pattern in bytes.
pub(crate) const MAX_PATTERN: usize = 1024;
/// Maximum size of a compiled pattern in bytes: `(a{1000}){1000}` is short but compiles to a large
/// automaton.
const MAX_COMPILED: usize = 1 << 20;
/// Maximum number of backtracking steps for a pattern with look-around or back references, per
/// name.
const MAX_STEPS: usize = 100_000;

/// Settings of the modules that one pattern matches; missing keys fall back to the branch's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Dynamic {
    /// Code width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<Bits>,
    /// Columns per group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<GroupSize>,
}

/// Patterns with their settings, in order.
#[derive(Clone, Debug, Default)]
pub struct DynamicRules {
    rules: Vec<(String, Dynamic)>,
    /// Compiled patterns, one per rule; built on first use.
    matchers: OnceLock<Result<Vec<Regex>, String>>,
}

impl DynamicRules {
    /// Returns the patterns with their settings, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Dynamic)> + Clone {
        self.rules.iter().map(|(pattern, own)| (&**pattern, own))
    }

    /// Checks that all patterns compile and are within the limits; the error is a sentence.
    pub(crate) fn check(&self) -> Result<(), String> {
        let long = self.rules.iter().any(|(it, _)| it.len() > MAX_PATTERN);
        if long || self.rules.len() > MAX_PATTERNS {
            return Err(format!(
                "dynamic has over {MAX_PATTERNS} patterns, or one of over {MAX_PATTERN} bytes"
            ));
        }
        self.matchers().map(|_| ())
    }

    /// Returns the first rule that matches a module: whether it is quantized, and its settings.
    pub(crate) fn find(&self, module: &str) -> Result<Option<(bool, &Dynamic)>, String> {
        for ((pattern, own), matcher) in self.rules.iter().zip(self.matchers()?) {
            let matches = matcher.is_match(module);
            if matches.map_err(|why| refused(pattern, &why))? {
                return Ok(Some((!pattern.starts_with("-:"), own)));
            }
        }
        Ok(None)
    }

    fn matchers(&self) -> Result<&[Regex], String> {
        let compile = |(pattern, _): &(String, Dynamic)| {
            let expression = (pattern.strip_prefix("-:"))
                .or_else(|| pattern.strip_prefix("+:"))
                .unwrap_or(pattern);
            RegexBuilder::new(&format!("^(?:{expression})"))
                .delegate_size_limit(MAX_COMPILED)
                .backtrack_limit(MAX_STEPS)
                .build()
                .map_err(|why| refused(pattern, &why))
        };
        let all = || self.rules.iter().map(compile).collect();
        match self.matchers.get_or_init(all) {
            Ok(matchers) => Ok(matchers),
            Err(reason) => Err(reason.clone()),
        }
    }
}

/// Describes in one line what is wrong with a pattern.
fn refused(pattern: &str, why: &Error) -> String {
    let large = match why {
        Error::CompileError(why) => match &**why {
            CompileError::InnerError(why) => why.size_limit(),
            _ => None,
        },
        _ => None,
    };
    let words = match large {
        Some(limit) => format!("over {limit} bytes as compiled"),
        None => why.to_string(),
    };
    let words: Vec<&str> = words.split_whitespace().collect();
    format!("dynamic pattern {pattern:?}: {}", words.join(" "))
}

impl PartialEq for DynamicRules {
    fn eq(&self, other: &Self) -> bool {
        self.rules == other.rules
    }
}

impl FromIterator<(String, Dynamic)> for DynamicRules {
    fn from_iter<I: IntoIterator<Item = (String, Dynamic)>>(rules: I) -> Self {
        DynamicRules {
            rules: rules.into_iter().collect(),
            matchers: OnceLock::new(),
        }
    }
}

impl Serialize for DynamicRules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for DynamicRules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(InOrder)
    }
}

struct InOrder;

impl<'de> Visitor<'de> for InOrder {
    type Value = DynamicRules;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("an object of patterns and their settings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<DynamicRules, A::Error> {
        let mut rules: Vec<(String, Dynamic)> = Vec::new();
        while let Some((pattern, own)) = map.next_entry::<String, Option<Dynamic>>()? {
            let own = own.unwrap_or_default();
            // A repeated key keeps its position and takes the later value, as in Python.
            if let Some((_, before)) = rules.iter_mut().find(|(it, _)| *it == pattern) {
                *before = own;
            } else if rules.len() <= MAX_PATTERNS {
                rules.push((pattern, own));
            }
        }
        Ok(rules.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(text: &str) -> DynamicRules {
        serde_json::from_str(text).unwrap()
    }

    fn find(rules: &DynamicRules, module: &str) -> Option<(bool, Option<Bits>)> {
        let found = rules.find(module).unwrap();
        found.map(|(keep, own)| (keep, own.bits))
    }

    #[test]
    fn look_around_is_understood_as_python_has_it() {
        // `re.match(r".*\.(?!0\.)\d+\..*(?<=up)_proj$", name)` in Python 3.11.
        let rules = rules(r#"{"-:.*\\.(?!0\\.)\\d+\\..*(?<=up)_proj$": {}}"#);
        assert_eq!(find(&rules, "model.layers.0.mlp.up_proj"), None);
        let one = find(&rules, "model.layers.1.mlp.up_proj");
        assert_eq!(one, Some((false, None)));
        assert_eq!(find(&rules, "model.layers.1.mlp.down_proj"), None);
    }

    #[test]
    fn a_pattern_without_end_is_refused_by_its_steps_and_one_that_is_none_by_its_words() {
        let endless = rules(r#"{"(?=x)(a+)+\\1$|(a*)*\\2b": {}}"#);
        endless.check().unwrap();
        let reason = endless.find(&"a".repeat(400)).unwrap_err();
        assert!(reason.contains("acktrack"), "{reason}");
        let reason = rules(r#"{"(": {}}"#).check().unwrap_err();
        assert!(reason.starts_with("dynamic pattern \"(\": "), "{reason}");
        assert!(!reason.contains('\n'), "{reason}");
    }

    #[test]
    fn values_may_be_null_and_a_key_may_come_twice() {
        let rules = rules(r#"{"a": {"bits": 4}, "-:b": null, "a": {"bits": 8}}"#);
        let patterns: Vec<&str> = rules.iter().map(|(pattern, _)| pattern).collect();
        assert_eq!(patterns, ["a", "-:b"]);
        assert_eq!(find(&rules, "abc"), Some((true, Some(Bits::Eight))));
        let text = serde_json::to_string(&rules).unwrap();
        assert_eq!(text, r#"{"a":{"bits":8},"-:b":{}}"#);
    }
}
