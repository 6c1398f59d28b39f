//! Settings of compressed-tensors in `config.json`, as they are read.
//!
//! `config_groups` gives each group of modules its settings; its targets are class names (`Linear`), names of modules,
//! or, after `re:`, expressions that match from the beginning of a name. A name goes before an expression, an
//! expression before a class, and `ignore` before all. So `dynamic` has the same in its own order: what is ignored,
//! then names, then expressions, then the settings of `Linear`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::declared::{Declared, alternatives};
use crate::dynamic_rules::Dynamic;
use crate::{Bits, FormatError, GroupSize};

/// The class that stands for all linear layers of a model.
const LINEAR: &str = "Linear";

/// The part of the settings that is read.
#[derive(Deserialize)]
struct CompressedConfig {
    #[serde(default)]
    config_groups: BTreeMap<String, Group>,
    #[serde(default)]
    ignore: Option<Vec<String>>,
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    sparsity_config: Option<Map<String, Value>>,
    #[serde(default)]
    transform_config: Option<Map<String, Value>>,
    #[serde(default)]
    kv_cache_scheme: Option<Value>,
}

#[derive(Deserialize)]
struct Group {
    targets: Vec<String>,
    weights: Option<WeightArgs>,
    #[serde(default)]
    input_activations: Option<Value>,
    #[serde(default)]
    output_activations: Option<Value>,
    #[serde(default)]
    format: Option<String>,
}

#[derive(Deserialize)]
struct WeightArgs {
    num_bits: u32,
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default = "symmetric")]
    symmetric: bool,
    #[serde(default)]
    group_size: Option<i64>,
    #[serde(default)]
    strategy: Option<String>,
    #[serde(default)]
    actorder: Option<Value>,
}

fn symmetric() -> bool {
    true
}

/// Settings of one group: width, columns, and whether codes are symmetric.
type GroupChoice = (Bits, GroupSize, bool);

/// Reads the settings in `keys`, from the file `path`.
///
/// # Errors
/// Settings that do not parse, or that ask for more than weights in `pack-quantized`.
pub(crate) fn read(path: &Path, keys: Map<String, Value>) -> Result<Declared, FormatError> {
    let settings: CompressedConfig =
        serde_json::from_value(Value::Object(keys)).map_err(|source| FormatError::Json {
            path: path.into(),
            source,
        })?;
    let refuse = |what: &str| FormatError::OtherMethod {
        path: path.into(),
        method: format!("compressed-tensors with {what}"),
        dense: false,
    };
    let others = settings.others();
    if let Some(what) = others {
        return Err(refuse(&what));
    }
    let (mut names, mut expressions, mut linear) = (vec![], vec![], None);
    for group in settings.config_groups.values() {
        let choice = group.choice().map_err(|what| refuse(&what))?;
        for target in &group.targets {
            match (target.strip_prefix("re:"), target.as_str()) {
                (Some(expression), _) => expressions.push((expression.to_owned(), choice)),
                (None, LINEAR) if linear.is_some_and(|other| other != choice) => {
                    return Err(refuse("two groups for the same linear layers"));
                }
                (None, LINEAR) => linear = Some(choice),
                (None, name) => names.push((name.to_owned(), choice)),
            }
        }
    }
    expressions.sort_by(|one, other| one.0.cmp(&other.0));
    let all = names.iter().chain(&expressions).map(|(_, choice)| *choice);
    let base = linear.or_else(|| all.clone().next());
    let Some((bits, group_size, sym)) = base else {
        return Err(refuse("no group of linear layers (config_groups)"));
    };
    if all.clone().any(|(_, _, other)| other != sym) {
        return Err(refuse(
            "symmetric and asymmetric linear layers in one model",
        ));
    }
    let mut dynamic = Vec::new();
    let ignored = settings.ignore.unwrap_or_default();
    let (patterns, plain): (Vec<&String>, Vec<&String>) =
        ignored.iter().partition(|it| it.starts_with("re:"));
    let dense = |pattern: String| (format!("-:{pattern}"), Dynamic::default());
    dynamic.extend(alternatives(plain.into_iter()).map(dense));
    let expression = |it: &String| it.strip_prefix("re:").unwrap_or(it).to_owned();
    dynamic.extend(patterns.into_iter().map(expression).map(dense));
    let mut same: Vec<(GroupChoice, Vec<&String>)> = Vec::new();
    for (name, choice) in &names {
        match same.iter_mut().find(|(other, _)| other == choice) {
            Some((_, names)) => names.push(name),
            None => same.push((*choice, vec![name])),
        }
    }
    let own = |pattern: String, (bits, group_size, _): GroupChoice| {
        let own = Dynamic {
            bits: Some(bits),
            group_size: Some(group_size),
        };
        (format!("+:{pattern}"), own)
    };
    for (choice, names) in same {
        dynamic.extend(alternatives(names.into_iter()).map(|it| own(it, choice)));
    }
    dynamic.extend(expressions.into_iter().map(|(it, choice)| own(it, choice)));
    if linear.is_none() {
        dynamic.push(dense(String::new()));
    }
    Ok(Declared::new((bits, group_size), sym, dynamic))
}

impl CompressedConfig {
    /// Describes settings of something other than packed weights.
    fn others(&self) -> Option<String> {
        let is = |it: &Option<String>| it.as_ref().is_none_or(|it| it == "pack-quantized");
        let mut formats = self.config_groups.values().map(|group| &group.format);
        let format = [&self.format].into_iter().chain(&mut formats);
        if let Some(Some(other)) = format.into_iter().find(|it| !is(it)) {
            return Some(format!("format {other:?}"));
        }
        let sparse = self.sparsity_config.as_ref().is_some_and(|it| {
            let format = it.get("format").and_then(Value::as_str);
            !it.is_empty() && format != Some("dense")
        });
        let turned = (self.transform_config.as_ref())
            .and_then(|it| it.get("config_groups"))
            .and_then(Value::as_object)
            .is_some_and(|it| !it.is_empty());
        let quantized = |it: &Option<Value>| it.as_ref().is_some_and(|it| !it.is_null());
        let active =
            |it: &Group| quantized(&it.input_activations) || quantized(&it.output_activations);
        if sparse {
            Some("sparse weights (sparsity_config)".to_owned())
        } else if turned {
            Some("rotated weights (transform_config)".to_owned())
        } else if quantized(&self.kv_cache_scheme) {
            Some("a quantized cache (kv_cache_scheme)".to_owned())
        } else if self.config_groups.values().any(active) {
            Some("quantized activations".to_owned())
        } else {
            None
        }
    }
}

impl Group {
    /// Returns the settings of its weights; the error says what is not read.
    fn choice(&self) -> Result<GroupChoice, String> {
        let Some(weights) = &self.weights else {
            return Err("a group without weights".to_owned());
        };
        let kind = weights.kind.as_deref().unwrap_or("int");
        let bits = match kind {
            "int" => Bits::try_from(weights.num_bits).ok(),
            _ => None,
        };
        let bits = bits.ok_or_else(|| format!("weights of {} bits ({kind})", weights.num_bits))?;
        let scattered = match &weights.actorder {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(order) => !["weight", "static"].contains(&order.as_str().unwrap_or_default()),
        };
        if scattered {
            return Err("act order by group (actorder)".to_owned());
        }
        let group_size = match (weights.strategy.as_deref(), weights.group_size) {
            (None | Some("channel"), None | Some(-1)) => GroupSize::Row,
            (None | Some("group"), Some(size)) => GroupSize::try_from(size)?,
            (strategy, _) => {
                return Err(format!("the strategy {:?}", strategy.unwrap_or_default()));
            }
        };
        Ok((bits, group_size, weights.symmetric))
    }
}

#[cfg(test)]
mod tests;
