//! Model families: from `config.json` to the description of each block, one file a family.
//!
//! A family says what its config leaves out (Transformers' `configuration_*.py`) and of which parts a block
//! consists (`modeling_*.py`). To add one, add its file and its row in [`FAMILIES`].

mod llama;
mod mistral;
mod parts;
mod qwen2;
mod qwen3;

use serde_json::{Map, Value};

use crate::config::SlidingWindow;
use crate::{BlockSpec, ModelConfig};

/// Model types this crate runs.
pub(crate) const FAMILIES: &[Family] =
    &[llama::FAMILY, mistral::FAMILY, qwen2::FAMILY, qwen3::FAMILY];

/// A `model_type`.
pub(crate) struct Family {
    pub(crate) model_type: &'static str,
    /// Keys of the config, and what they are where they are left out.
    pub(crate) defaults: &'static [(&'static str, usize)],
    pub(crate) sliding_window: SlidingWindow,
    /// Describes a block by its index. The config's shapes have been checked, its blocks are still
    /// missing. The error is a sentence.
    pub(crate) block: fn(&ModelConfig, &Keys<'_>, usize) -> Result<BlockSpec, String>,
}

/// The config's keys that only some families have.
pub(crate) struct Keys<'a>(pub(crate) &'a Map<String, Value>);

impl Keys<'_> {
    /// A switch, off where it is left out.
    fn flag(&self, key: &str) -> Result<bool, String> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(on)) => Ok(*on),
            Some(other) => Err(format!("{key} = {other} is neither true nor false")),
        }
    }
}
