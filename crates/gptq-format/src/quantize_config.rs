//! `quantize_config.json`, and the same object as `quantization_config` in `config.json`.
//!
//! Key names are AutoGPTQ's; `dynamic` is GPTQModel's way to give single modules their own settings
//! (`dynamic_rules.rs`), `modules_in_block_to_quantize` Optimum's to leave some in full precision.
//! Values `null` and `{}` count as missing. Settings of compressed-tensors (`compressed_settings.rs`) and MLX (`mlx_settings.rs`) are read
//! as the same settings in their formats.

use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::declared::Declared;
use crate::dynamic_rules::DynamicRules;
use crate::{
    Bits, CheckpointFormat, FormatError, GroupSize, compressed_settings, mlx_settings, read_json,
};

/// Settings of a branch as clients see them.
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
    /// "gptq", or the method of another format.
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
        // mlx-lm has the same object under both keys, and names no method.
        if let Some(Value::Object(keys)) = config
            .get("quantization")
            .filter(|it| mlx_settings::is_mlx(it))
        {
            let declared = mlx_settings::read(&path, keys.clone())?;
            let config = QuantizeConfig::of_declared(declared, CheckpointFormat::Mlx);
            return QuantizeConfig::checked(&path, config).map(Some);
        }
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
        if method == "compressed-tensors" {
            let declared = compressed_settings::read(path, keys)?;
            let format = CheckpointFormat::CompressedTensors;
            let config = QuantizeConfig::of_declared(declared, format);
            return QuantizeConfig::checked(path, config).map(Some);
        }
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
        if !config.checkpoint_format.is_autogptq() {
            let name = config.checkpoint_format.name();
            return Err(FormatError::Malformed {
                path: path.into(),
                reason: format!(
                    "checkpoint_format {name:?} is none of gptq; write \"gptq\" or \"gptq_v2\""
                ),
            });
        }
        QuantizeConfig::checked(path, config).map(Some)
    }

    /// Returns `config` if its patterns are within the limits.
    fn checked(path: &Path, config: QuantizeConfig) -> Result<QuantizeConfig, FormatError> {
        match config.check_patterns() {
            Ok(()) => Ok(config),
            Err(reason) => Err(FormatError::Malformed {
                path: path.into(),
                reason,
            }),
        }
    }

    /// Returns the settings of files in another format than AutoGPTQ's.
    pub(crate) fn of_declared(declared: Declared, format: CheckpointFormat) -> QuantizeConfig {
        QuantizeConfig {
            bits: declared.bits,
            group_size: declared.group_size,
            damp_percent: None,
            desc_act: false,
            static_groups: false,
            sym: declared.sym,
            true_sequential: true,
            model_name_or_path: None,
            model_file_base_name: None,
            quant_method: format.quant_method().to_owned(),
            checkpoint_format: format,
            dynamic: declared.dynamic,
            modules_in_block_to_quantize: None,
        }
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
mod tests;
