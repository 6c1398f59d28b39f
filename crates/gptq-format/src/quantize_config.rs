//! `quantize_config.json`, and the same object as `quantization_config` in `config.json`.
//!
//! Key names are AutoGPTQ's; `dynamic` is GPTQModel's way to give single modules their own settings
//! (`dynamic_rules.rs`), `modules_in_block_to_quantize` Optimum's to leave some in full precision.
//! Values `null` and `{}` count as missing.

use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::dynamic_rules::DynamicRules;
use crate::{Bits, CheckpointFormat, FormatError, GroupSize, read_json};

/// A of a branch as clients see them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizeConfig {
    /// Code width.
    pub bits: Bits,
    /// Columns per group.
    pub group_size: GroupSize,
    /// Damping as a fraction of the mean diagonal of the Hessian; some tools store it elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damp_percent: Option<f64>,
    /// Act order as declared to clients: groups that are not contiguous. Columns solved in that
    /// order with groups in the original column order (`static_groups`) do not need it.
    #[serde(default)]
    pub desc_act: bool,
    /// Groups fixed from the original weights.
    #[serde(default)]
    pub static_groups: bool,
    /// True for symmetric codes.
    #[serde(default = "yes")]
    pub sym: bool,
    /// Later linear layers of a block see the error of earlier ones.
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
    /// Storage of zero points.
    #[serde(default)]
    pub checkpoint_format: CheckpointFormat,
    /// Per-module settings, by prefixed regular expression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dynamic: Option<DynamicRules>,
    /// Endings of the names of the quantized modules, if not all are quantized; in lists of those
    /// that were quantized together, or in one list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modules_in_block_to_quantize: Option<Vec<OneOrMany>>,
}

/// A name, or a list of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
#[allow(missing_docs, reason = "the names say it")]
pub enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn names(&self) -> &[String] {
        match self {
            OneOrMany::One(name) => std::slice::from_ref(name),
            OneOrMany::Many(names) => names,
        }
    }
}

fn yes() -> bool {
    true
}

fn gptq() -> String {
    "gptq".into()
}

/// The quantization part of `config.json`.
#[derive(Deserialize)]
struct Outside {
    quantization_config: Option<Ordered>,
}

/// The only key whose order matters.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Ordered {
    dynamic: Option<DynamicRules>,
}

impl QuantizeConfig {
    /// Reads a branch's settings from `quantize_config.json`, or else from `quantization_config` in
    /// `config.json`; `None` for a dense checkpoint.
    ///
    /// # Errors
    /// Files that cannot be read, or settings of a method other than GPTQ.
    pub fn read(dir: &Path) -> Result<Option<QuantizeConfig>, FormatError> {
        match QuantizeConfig::own(dir)? {
            Some(own) => Ok(Some(own)),
            None => QuantizeConfig::inside(dir),
        }
    }

    /// Reads `quantize_config.json`; `None` if it is missing.
    ///
    /// # Errors
    /// The same errors as [`QuantizeConfig::read`].
    pub fn own(dir: &Path) -> Result<Option<QuantizeConfig>, FormatError> {
        let path = dir.join("quantize_config.json");
        if !path.exists() {
            return Ok(None);
        }
        let order = || Ok(read_json::<Ordered>(&path)?.dynamic);
        QuantizeConfig::parse(&path, read_json(&path)?, order)
    }

    /// Reads `quantization_config` in `config.json`; `None` if it is missing.
    ///
    /// # Errors
    /// The same errors as [`QuantizeConfig::read`].
    pub fn inside(dir: &Path) -> Result<Option<QuantizeConfig>, FormatError> {
        let path = dir.join("config.json");
        if !path.exists() {
            return Ok(None);
        }
        let mut config: Value = read_json(&path)?;
        let inside = config.get_mut("quantization_config").map(Value::take);
        let order = || {
            let outside: Outside = read_json(&path)?;
            Ok(outside.quantization_config.unwrap_or_default().dynamic)
        };
        QuantizeConfig::parse(&path, inside.unwrap_or_default(), order)
    }

    /// Parses the settings; `order` holds `dynamic` in file order, which a `Value` does not keep.
    fn parse(
        path: &Path,
        value: Value,
        order: impl Fn() -> Result<Option<DynamicRules>, FormatError>,
    ) -> Result<Option<QuantizeConfig>, FormatError> {
        let Value::Object(mut keys) = value else {
            return match value {
                Value::Null => Ok(None),
                _ => Err(FormatError::Malformed {
                    path: path.into(),
                    reason: "quantization settings that are not an object; remove them".into(),
                }),
            };
        };
        keys.retain(|_, value| !value.is_null());
        if keys.is_empty() {
            return Ok(None);
        }
        let method = method(&keys);
        if method != "gptq" {
            return Err(FormatError::OtherMethod {
                path: path.into(),
                method,
                dense: false,
            });
        }
        // Older files of GPTQModel have `format` in place of `checkpoint_format`.
        if !keys.contains_key("checkpoint_format")
            && let Some(format) = keys.get("format").cloned()
        {
            keys.insert("checkpoint_format".to_owned(), format);
        }
        let ordered = match keys.contains_key("dynamic") {
            true => order()?,
            false => None,
        };
        let json = |source| FormatError::Json {
            path: path.into(),
            source,
        };
        let mut config: QuantizeConfig =
            serde_json::from_value(Value::Object(keys)).map_err(json)?;
        config.dynamic = ordered;
        if let Err(reason) = config.check_patterns() {
            return Err(FormatError::Malformed {
                path: path.into(),
                reason,
            });
        }
        Ok(Some(config))
    }

    /// Checks that the patterns of `dynamic` are within the limits of this crate's reader. Writers
    /// use it too.
    ///
    /// # Errors
    /// A pattern beyond a limit; the error is half a line.
    pub fn check_patterns(&self) -> Result<(), String> {
        self.dynamic.as_ref().map_or(Ok(()), DynamicRules::check)
    }

    /// Returns the bits and group size of one module, or `None` if it is left in full precision.
    ///
    /// # Errors
    /// A `dynamic` pattern that takes too long to match.
    pub fn module(&self, name: &str) -> Result<Option<(Bits, GroupSize)>, FormatError> {
        let listed = self.listed();
        if !listed.is_empty() && !listed.iter().any(|ending| name.ends_with(*ending)) {
            return Ok(None);
        }
        let found = self.dynamic.as_ref().map(|rules| rules.find(name));
        let found = found.transpose().map_err(|reason| FormatError::Malformed {
            path: "quantize_config.json".into(),
            reason,
        })?;
        Ok(match found.flatten() {
            None => Some((self.bits, self.group_size)),
            Some((false, _)) => None,
            Some((true, own)) => Some((
                own.bits.unwrap_or(self.bits),
                own.group_size.unwrap_or(self.group_size),
            )),
        })
    }

    /// Returns the endings of the quantized modules' names if only listed modules are quantized.
    pub fn listed(&self) -> Vec<&str> {
        let lists = self.modules_in_block_to_quantize.iter().flatten();
        let names = lists.flat_map(OneOrMany::names);
        names.map(String::as_str).collect()
    }
}

/// Returns the method that these settings belong to.
fn method(keys: &Map<String, Value>) -> String {
    let text = |key: &str| keys.get(key)?.as_str().map(str::to_ascii_lowercase);
    let is = |key: &str| keys.get(key).is_some_and(|value| value == true);
    match text("quant_method").or_else(|| text("method")) {
        Some(method) => method,
        None if is("load_in_4bit") || is("load_in_8bit") => "bitsandbytes".to_owned(),
        None if keys.contains_key("w_bit") || text("version").is_some() => "AWQ".to_owned(),
        None if keys.contains_key("config_groups") => "compressed-tensors".to_owned(),
        // AutoGPTQ's own files do not name the method.
        None if keys.contains_key("bits") => "gptq".to_owned(),
        None => "a method that it does not name (no quant_method)".to_owned(),
    }
}

/// Returns the method by which a tensor is quantized, judging by its name and type.
pub(crate) fn method_of(name: &str, dtype: Dtype) -> Option<&'static str> {
    let (_, suffix) = name.rsplit_once('.')?;
    let method = match (suffix, dtype) {
        ("qweight" | "qzeros" | "g_idx", _) => "GPTQ or AWQ",
        ("SCB" | "absmax" | "quant_map" | "nested_absmax" | "nested_quant_map", _) => {
            "bitsandbytes"
        }
        _ if name.contains(".quant_state.bitsandbytes") => "bitsandbytes",
        ("weight_packed", _) => "compressed-tensors",
        ("weight_scale" | "weight_scale_inv", _) => "fp8 or compressed-tensors",
        (_, Dtype::F8_E4M3 | Dtype::F8_E5M2) => "fp8",
        _ => return None,
    };
    Some(method)
}

/// Returns stems that the weight file may have by AutoGPTQ's rules, from whatever settings can be
/// read. Invalid settings are reported later.
pub(crate) fn base_names(dir: &Path) -> Vec<String> {
    let settings = |file: &str| read_json::<Value>(&dir.join(file)).ok();
    let own = settings("quantize_config.json");
    let inside = settings("config.json").and_then(|it| it.get("quantization_config").cloned());
    let mut names = Vec::new();
    for settings in [own, inside].into_iter().flatten() {
        let named = ["model_file_base_name", "model_basename"].into_iter();
        let named = named.filter_map(|key| settings.get(key)?.as_str());
        // Only plain file names, so that the file is beside the config.
        let plain = |name: &&str| Path::new(name).file_name() == Some(name.as_ref());
        names.extend(named.filter(plain).map(str::to_owned));
        if let (Some(bits), Some(group)) = (settings.get("bits"), settings.get("group_size")) {
            names.push(format!("gptq_model-{bits}bit-{group}g"));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dynamic_rules::{MAX_PATTERN, MAX_PATTERNS};

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
    fn settings_that_say_nothing_are_none_and_those_of_others_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let read = |settings: &str| {
            let config = format!(r#"{{"quantization_config": {settings}}}"#);
            std::fs::write(dir.path().join("config.json"), config).unwrap();
            QuantizeConfig::read(dir.path()).map_err(|error| error.to_string())
        };
        for nothing in ["null", "{}", r#"{"quant_method": null}"#] {
            assert_eq!(read(nothing), Ok(None), "{nothing}");
        }
        for (settings, method) in [
            (
                r#"{"quant_method": "bitsandbytes", "load_in_4bit": true}"#,
                "bitsandbytes",
            ),
            (r#"{"load_in_8bit": true}"#, "bitsandbytes"),
            (r#"{"quant_method": "fp8"}"#, "fp8"),
            (r#"{"quant_method": "awq", "bits": 4}"#, "awq"),
            (r#"{"version": "gemm"}"#, "AWQ"),
            (
                r#"{"quant_method": "compressed-tensors"}"#,
                "compressed-tensors",
            ),
            (r#"{"modules": []}"#, "does not name"),
            (r#""gptq""#, "not an object"),
        ] {
            let line = read(settings).unwrap_err();
            assert!(
                line.contains(method) && line.contains("config.json: "),
                "{line}"
            );
        }
        let nulls =
            r#"{"bits": 4, "group_size": 64, "sym": null, "dynamic": null, "damp_percent": null}"#;
        let config = read(nulls).unwrap().unwrap();
        assert!(config.sym && config.dynamic.is_none());
    }

    #[test]
    fn only_the_modules_that_are_listed_are_quantized() {
        let module = |lists: &str, name: &str| {
            let config: QuantizeConfig = serde_json::from_str(&format!(
                r#"{{"bits": 4, "group_size": 64, "modules_in_block_to_quantize": {lists}}}"#
            ))
            .unwrap();
            config.module(name).unwrap().is_some()
        };
        for lists in [
            r#"[["self_attn.q_proj", "self_attn.v_proj"], ["mlp.up_proj"]]"#,
            r#"["self_attn.q_proj", "mlp.up_proj"]"#,
        ] {
            assert!(module(lists, "model.layers.0.self_attn.q_proj"));
            assert!(!module(lists, "model.layers.0.self_attn.k_proj"));
        }
        assert!(module("[]", "model.layers.0.self_attn.k_proj"));
    }

    #[test]
    fn dynamic_is_tried_in_the_order_in_which_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let rules = [
            r#""-:.*layers\\.0\\..*": {}"#,
            r#""+:.*down_proj.*": {"bits": 8}"#,
        ];
        let module = |first: usize, name: &str| {
            let dynamic = format!("{}, {}", rules[first], rules[1 - first]);
            let settings = format!(r#"{{"bits": 4, "group_size": 64, "dynamic": {{{dynamic}}}}}"#);
            let inside = format!(r#"{{"quantization_config": {settings}}}"#);
            std::fs::write(dir.path().join("quantize_config.json"), settings).unwrap();
            std::fs::write(dir.path().join("config.json"), inside).unwrap();
            let both = [
                QuantizeConfig::own(dir.path()),
                QuantizeConfig::inside(dir.path()),
            ];
            let both = both.map(|it| it.unwrap().unwrap().module(name).unwrap());
            assert_eq!(both[0], both[1]);
            both[0].map(|(bits, _)| bits)
        };
        // As GPTQModel's `dynamic_get` has it.
        assert_eq!(module(0, "model.layers.0.mlp.down_proj"), None);
        assert_eq!(module(1, "model.layers.0.mlp.down_proj"), Some(Bits::Eight));
        assert_eq!(module(0, "model.layers.1.mlp.down_proj"), Some(Bits::Eight));
        assert_eq!(module(1, "model.layers.0.mlp.up_proj"), None);
    }

    #[test]
    fn patterns_over_a_limit_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let read = |patterns: Vec<String>| {
            let dynamic: Map<_, _> = (patterns.into_iter())
                .map(|pattern| (pattern, serde_json::json!({})))
                .collect();
            let config = serde_json::json!({"bits": 4, "group_size": 64, "dynamic": dynamic});
            std::fs::write(dir.path().join("quantize_config.json"), config.to_string()).unwrap();
            QuantizeConfig::read(dir.path()).map(|config| config.unwrap())
        };
        let many = |n: usize| (0..n).map(|i| format!("-:{i}")).collect();
        assert!(read(many(MAX_PATTERNS)).is_ok());
        assert!(read(many(MAX_PATTERNS + 1)).is_err());
        assert!(read(vec!["x".repeat(MAX_PATTERN + 1)]).is_err());
        let error = read(vec!["((a{100}){100}){100}".into()]).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("over 1048576 bytes as compiled"), "{error}");
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
