//! Settings of MLX in `config.json`, as they are read: `quantization` has those of most modules, and by name those of the
//! others, `false` for one in full precision.

use std::path::Path;

use serde_json::{Map, Value};

use crate::declared::{Declared, alternatives};
use crate::dynamic_rules::Dynamic;
use crate::{Bits, FormatError, GroupSize};

/// Keys of `quantization` that are no modules.
const KEYS: [&str; 3] = ["bits", "group_size", "mode"];

/// Returns true if `quantization` of a `config.json` is MLX's.
pub(crate) fn is_mlx(quantization: &Value) -> bool {
    let keys = quantization.as_object();
    keys.is_some_and(|keys| keys.contains_key("bits") && keys.contains_key("group_size"))
}

/// Reads `quantization` of the `config.json` at `path`.
///
/// # Errors
/// Settings that do not parse, or of another mode.
pub(crate) fn read(path: &Path, keys: Map<String, Value>) -> Result<Declared, FormatError> {
    let json = |source| FormatError::Json {
        path: path.into(),
        source,
    };
    let mode = keys.get("mode").and_then(Value::as_str).unwrap_or("affine");
    if mode != "affine" {
        return Err(FormatError::OtherMethod {
            path: path.into(),
            method: format!("mlx with mode {mode:?}"),
            dense: false,
        });
    }
    let of = |keys: &Value| -> Result<(Bits, GroupSize), FormatError> {
        let bits = serde_json::from_value(keys.get("bits").cloned().unwrap_or_default());
        let size = serde_json::from_value(keys.get("group_size").cloned().unwrap_or_default());
        Ok((bits.map_err(json)?, size.map_err(json)?))
    };
    let (bits, group_size) = of(&Value::Object(keys.clone()))?;
    type Setting = Option<(Bits, GroupSize)>;
    let mut same: Vec<(Setting, Vec<&String>)> = Vec::new();
    for (module, value) in keys.iter().filter(|(key, _)| !KEYS.contains(&key.as_str())) {
        let choice = match value {
            Value::Bool(true) => continue,
            Value::Bool(false) => None,
            other => Some(of(other)?),
        };
        match same.iter_mut().find(|(known, _)| *known == choice) {
            Some((_, modules)) => modules.push(module),
            None => same.push((choice, vec![module])),
        }
    }
    let mut dynamic = Vec::new();
    for (choice, modules) in same {
        for pattern in alternatives(modules.into_iter()) {
            let sign = if choice.is_some() { '+' } else { '-' };
            let own = Dynamic {
                bits: choice.map(|(bits, _)| bits),
                group_size: choice.map(|(_, size)| size),
            };
            dynamic.push((format!("{sign}:{pattern}"), own));
        }
    }
    Ok(Declared::new((bits, group_size), true, dynamic))
}
