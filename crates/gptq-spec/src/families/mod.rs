//! Model families: from `config.json` to the description of each block, one file a family.
//!
//! A family says what its config leaves out (Transformers' `configuration_*.py`) and of which parts a block
//! consists (`modeling_*.py`). To add one, add its file and its row in [`FAMILIES`].

mod cohere2;
mod exaone4;
mod family;
mod gemma2;
mod gemma3;
mod glm4;
mod granite;
mod llama;
mod mistral;
mod mistral3;
mod olmo2;
mod olmo3;
mod parts;
mod phi3;
mod qwen2;
mod qwen3;
mod seed_oss;
mod sliding_window;
mod smollm3;

pub use family::{Ends, Naming};
pub(crate) use family::{Family, Rotary};
use family::{flag, number, off, or_none};
use sliding_window::SlidingWindow;

/// Families, by model type.
pub(crate) const FAMILIES: &[Family] = &[
    cohere2::FAMILY,
    exaone4::FAMILY,
    gemma2::FAMILY,
    gemma3::FAMILY,
    gemma3::TEXT,
    glm4::FAMILY,
    granite::FAMILY,
    llama::FAMILY,
    mistral::FAMILY,
    mistral3::FAMILY,
    olmo2::FAMILY,
    olmo3::FAMILY,
    phi3::FAMILY,
    qwen2::FAMILY,
    qwen3::FAMILY,
    seed_oss::FAMILY,
    smollm3::FAMILY,
];

/// Every `model_type` that can be run, in alphabetical order.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.model_type)
}

#[cfg(test)]
mod tests;
