//! Model families: from `config.json` to the description of each block, one file a family.
//!
//! A family says what its config leaves out (Transformers' `configuration_*.py`) and of which parts a block
//! consists (`modeling_*.py`). To add one, add its file and its row in [`FAMILIES`].

mod llama;
mod mistral;
mod parts;
mod qwen2;
mod qwen3;
mod sliding_window;

use sliding_window::SlidingWindow;

use crate::keys::Keys;
use crate::{BlockSpec, ModelConfig};

/// Families, by model type.
pub(crate) const FAMILIES: &[Family] =
    &[llama::FAMILY, mistral::FAMILY, qwen2::FAMILY, qwen3::FAMILY];

/// Every `model_type` that can be run, in alphabetical order.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.model_type)
}

/// A `model_type`.
pub(crate) struct Family {
    pub(crate) model_type: &'static str,
    /// Keys of the config, and what they are where they are left out.
    defaults: &'static [(&'static str, usize)],
    sliding_window: SlidingWindow,
    /// Describes a block by its index. The config's shapes have been checked, its blocks are still
    /// missing. The error is a sentence.
    pub(crate) block: fn(&ModelConfig, &Keys<'_>, usize) -> Result<BlockSpec, String>,
}

impl Family {
    /// The family of a config.
    pub(crate) fn of(config: &Keys<'_>) -> Result<&'static Family, String> {
        let model_type: String = config.required("model_type")?;
        let known = FAMILIES.iter().find(|it| it.model_type == model_type);
        known.ok_or_else(|| {
            let known: Vec<&str> = model_types().collect();
            format!(
                "model_type {model_type:?} is not supported; known are: {}",
                known.join(", ")
            )
        })
    }

    /// What a key is where it is left out.
    pub(crate) fn default(&self, key: &str) -> Option<usize> {
        let mut defaults = self.defaults.iter();
        defaults.find(|(name, _)| *name == key).map(|&(_, it)| it)
    }

    /// How many tokens one sees in the blocks that see the fewest, if that is not all.
    pub(crate) fn sliding_window(
        &self,
        config: &Keys<'_>,
        layers: usize,
    ) -> Result<Option<usize>, String> {
        self.sliding_window.tokens(self, config, layers)
    }
}

/// A switch of the config, off where it is left out.
fn flag(config: &Keys<'_>, key: &str) -> Result<bool, String> {
    Ok(config.found(key)?.unwrap_or(false))
}
