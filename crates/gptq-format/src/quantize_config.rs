//! `quantize_config.json`, and the same object as `quantization_config` in `config.json`.
//!
//! Key names are AutoGPTQ's; `dynamic` is GPTQModel's way to give single modules their own
//! settings (also read by vLLM): a regular expression over module names, prefixed `+:` for other
//! settings or `-:` for "left in full precision".
//!
//! Limits: [`MAX_PATTERNS`] patterns of [`MAX_PATTERN`] bytes, [`MAX_COMPILED`] bytes each as compiled.

use std::collections::BTreeMap;
use std::path::Path;

use regex::RegexBuilder;
use serde::{Deserialize, Serialize};

use crate::{Bits, FormatError, GroupSize, read_json};

const MAX_PATTERNS: usize = 256;
/// Bytes of a pattern.
const MAX_PATTERN: usize = 1024;
/// Bytes of a pattern's automaton: `(a{1000}){1000}` is short and would be large.
const MAX_COMPILED: usize = 1 << 20;

/// How zero points are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CheckpointFormat {
    /// Version 1: `zero - 1`.
    #[default]
    #[serde(rename = "gptq")]
    Gptq,
    /// Version 2: the zero itself.
    #[serde(rename = "gptq_v2")]
    GptqV2,
}

impl CheckpointFormat {
    /// What is subtracted from a zero point before it is stored.
    pub fn zero_offset(self) -> u8 {
        match self {
            CheckpointFormat::Gptq => 1,
            CheckpointFormat::GptqV2 => 0,
        }
    }
}

/// Settings of the modules one `dynamic` pattern matches; absent keys fall back to the branch's.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Dynamic {
    /// Code width.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<Bits>,
    /// Columns per group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<GroupSize>,
}

/// A branch's settings as readers see them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizeConfig {
    /// Code width.
    pub bits: Bits,
    /// Columns per group.
    pub group_size: GroupSize,
    /// Damping as a fraction of the mean diagonal of the Hessian.
    #[serde(default)]
    pub damp_percent: f64,
    /// Act order.
    #[serde(default)]
    pub desc_act: bool,
    /// Groups fixed from the original weights.
    #[serde(default)]
    pub static_groups: bool,
    /// Symmetric codes.
    #[serde(default = "yes")]
    pub sym: bool,
    /// Later linears of a block see the error of earlier ones.
    #[serde(default = "yes")]
    pub true_sequential: bool,
    /// The base model's name; never a local path.
    #[serde(default)]
    pub model_name_or_path: Option<String>,
    /// Stem of the weight file.
    #[serde(default)]
    pub model_file_base_name: Option<String>,
    /// Always "gptq".
    #[serde(default = "gptq")]
    pub quant_method: String,
    /// How zero points are stored.
    #[serde(default)]
    pub checkpoint_format: CheckpointFormat,
    /// Per-module settings, by prefixed regular expression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dynamic: Option<BTreeMap<String, Dynamic>>,
}

fn yes() -> bool {
    true
}

fn gptq() -> String {
    "gptq".into()
}

impl QuantizeConfig {
    /// Reads a branch's settings from `quantize_config.json`, else from `quantization_config` in
    /// `config.json`; `None` for a dense checkpoint.
    pub fn read(dir: &Path) -> Result<Option<QuantizeConfig>, FormatError> {
        let own = dir.join("quantize_config.json");
        let (path, mut value) = if own.exists() {
            let value = read_json(&own)?;
            (own, value)
        } else {
            let path = dir.join("config.json");
            let mut config: serde_json::Value = read_json(&path)?;
            match config.get_mut("quantization_config") {
                Some(value) => (path, value.take()),
                None => return Ok(None),
            }
        };
        // GPTQModel's older files say `format` where others say `checkpoint_format`.
        if let Some(keys) = value.as_object_mut()
            && !keys.contains_key("checkpoint_format")
            && let Some(format) = keys.get("format").cloned()
        {
            keys.insert("checkpoint_format".to_owned(), format);
        }
        let config: QuantizeConfig =
            serde_json::from_value(value).map_err(|source| FormatError::Json {
                path: path.clone(),
                source,
            })?;
        if config.quant_method != "gptq" {
            return Err(FormatError::Malformed {
                path,
                reason: format!("quant_method is {:?}, not \"gptq\"", config.quant_method),
            });
        }
        if let Err(reason) = config.check_patterns() {
            return Err(FormatError::Malformed { path, reason });
        }
        Ok(Some(config))
    }

    /// Whether there are no more patterns in `dynamic`, and none longer, than readers of this crate take. For whoever
    /// writes them, too.
    ///
    /// # Errors
    /// There are; in half a line.
    pub fn check_patterns(&self) -> Result<(), String> {
        let patterns = || self.dynamic.iter().flatten();
        let (count, longest) = (
            patterns().count(),
            patterns().map(|(pattern, _)| pattern.len()).max(),
        );
        if count > MAX_PATTERNS || longest > Some(MAX_PATTERN) {
            return Err(format!(
                "dynamic has over {MAX_PATTERNS} patterns, or one of over {MAX_PATTERN} bytes"
            ));
        }
        Ok(())
    }

    /// The bits and group size of one module, or `None` when it is left in full precision.
    ///
    /// Errors when a `dynamic` pattern is not a regular expression.
    pub fn module(&self, name: &str) -> Result<Option<(Bits, GroupSize)>, FormatError> {
        for (pattern, own) in self.dynamic.iter().flatten() {
            let (keep, expression) = match pattern.strip_prefix("-:") {
                Some(expression) => (false, expression),
                None => (true, pattern.strip_prefix("+:").unwrap_or(pattern)),
            };
            // GPTQModel matches at the start of the name, like Python's `re.match`.
            let matcher = RegexBuilder::new(&format!("^(?:{expression})"))
                .size_limit(MAX_COMPILED)
                .build()
                .map_err(|e| FormatError::Malformed {
                    path: "quantize_config.json".into(),
                    reason: format!("dynamic pattern {pattern:?}: {e}").replace('\n', " "),
                })?;
            if matcher.is_match(name) {
                return Ok(keep.then(|| {
                    (
                        own.bits.unwrap_or(self.bits),
                        own.group_size.unwrap_or(self.group_size),
                    )
                }));
            }
        }
        Ok(Some((self.bits, self.group_size)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configs_of_other_tools_parse_with_their_extra_keys() {
        let config: QuantizeConfig = serde_json::from_str(
            r#"{"bits": 4, "group_size": 128, "desc_act": true, "lm_head": false, "method": "gptq",
                "quant_method": "gptq", "checkpoint_format": "gptq", "meta": {"damp_percent": 0.1}, "sym": true}"#,
        )
        .unwrap();
        assert_eq!(config.bits, Bits::Four);
        assert_eq!(config.group_size, GroupSize::Columns(128));
        assert!(config.desc_act && config.sym);
    }

    #[test]
    fn the_older_name_of_the_format_counts_where_the_newer_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        for (text, expected) in [
            (
                r#"{"bits": 4, "group_size": 64, "format": "gptq_v2"}"#,
                CheckpointFormat::GptqV2,
            ),
            (
                r#"{"bits": 4, "group_size": 64, "format": "gptq_v2", "checkpoint_format": "gptq"}"#,
                CheckpointFormat::Gptq,
            ),
        ] {
            std::fs::write(dir.path().join("quantize_config.json"), text).unwrap();
            let config = QuantizeConfig::read(dir.path()).unwrap().unwrap();
            assert_eq!(config.checkpoint_format, expected);
        }
    }

    #[test]
    fn patterns_over_a_limit_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let read = |patterns: Vec<String>| {
            let dynamic: BTreeMap<_, _> =
                patterns.iter().map(|p| (p, Dynamic::default())).collect();
            let config = serde_json::json!({"bits": 4, "group_size": 64, "dynamic": dynamic});
            std::fs::write(dir.path().join("quantize_config.json"), config.to_string()).unwrap();
            QuantizeConfig::read(dir.path()).map(|config| config.unwrap())
        };
        let many = |n: usize| (0..n).map(|i| format!("-:{i}")).collect();
        assert!(read(many(MAX_PATTERNS)).is_ok());
        assert!(read(many(MAX_PATTERNS + 1)).is_err());
        assert!(read(vec!["x".repeat(MAX_PATTERN + 1)]).is_err());
        let bomb = read(vec!["((a{100}){100}){100}".into()]).unwrap();
        let error = bomb.module("m").unwrap_err().to_string();
        assert!(error.contains("size limit"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn dynamic_patterns_override_or_skip_modules() {
        let config: QuantizeConfig = serde_json::from_str(
            r#"{"bits": 4, "group_size": 128, "dynamic": {
                "+:.*\\.down_proj$": {"bits": 8, "group_size": 32}, "-:.*\\.k_proj$": {}}}"#,
        )
        .unwrap();
        let module = |name| config.module(name).unwrap();
        assert_eq!(
            module("model.layers.0.mlp.down_proj"),
            Some((Bits::Eight, GroupSize::Columns(32)))
        );
        assert_eq!(module("model.layers.0.self_attn.k_proj"), None);
        assert_eq!(
            module("model.layers.0.self_attn.q_proj"),
            Some((Bits::Four, GroupSize::Columns(128)))
        );
    }
}
