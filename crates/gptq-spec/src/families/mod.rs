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
mod glm4_moe;
mod granite;
mod llama;
mod mistral;
mod mistral3;
mod mixtral;
mod mixture;
mod olmo2;
mod olmo3;
mod olmoe;
mod parts;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod seed_oss;
mod sliding_window;
mod smollm3;

use family::Inside;
pub use family::{Ends, Naming};
pub(crate) use family::{Family, Rotary};

use crate::keys::Keys;

/// Families, by model type.
pub(crate) const FAMILIES: &[Family] = &[
    cohere2::FAMILY,
    exaone4::FAMILY,
    gemma2::FAMILY,
    gemma3::FAMILY,
    gemma3::TEXT,
    glm4::FAMILY,
    glm4_moe::FAMILY,
    granite::FAMILY,
    llama::FAMILY,
    mistral::FAMILY,
    mistral3::FAMILY,
    mixtral::FAMILY,
    olmo2::FAMILY,
    olmo3::FAMILY,
    olmoe::FAMILY,
    phi3::FAMILY,
    qwen2::FAMILY,
    qwen2_moe::FAMILY,
    qwen3::FAMILY,
    qwen3_moe::FAMILY,
    seed_oss::FAMILY,
    smollm3::FAMILY,
];

/// Every `model_type` that can be run, in alphabetical order.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.model_type)
}

/// The family of a config.
pub(crate) fn family_of(config: &Keys<'_>) -> Result<&'static Family, String> {
    let model_type: String = config.required("model_type")?;
    named(&model_type, &config.name("model_type"))
}

fn named(model_type: &str, key: &str) -> Result<&'static Family, String> {
    let known = FAMILIES.iter().find(|it| it.model_type == model_type);
    known.ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().map(|it| it.model_type).collect();
        format!(
            "{key} {model_type:?} is not supported; known are: {}",
            known.join(", ")
        )
    })
}

/// The config of the language model in a config of family `outer`, and the family of that.
pub(crate) fn language_model<'a>(
    outer: &Family,
    config: Keys<'a>,
) -> Result<(Keys<'a>, &'static Family), String> {
    match &outer.inside {
        None => {
            let family = family_of(&config)?;
            Ok((config, family))
        }
        Some(Inside { key, model_type }) => {
            let missing = || format!("{key} is missing");
            let text = config.inside(key)?.ok_or_else(missing)?;
            let found: Option<String> = text.found("model_type")?;
            let found = found.as_deref().unwrap_or(model_type);
            let family = named(found, &text.name("model_type"))?;
            match family.inside {
                None => Ok((text, family)),
                Some(_) => Err(format!(
                    "{} {found:?} has another inside",
                    text.name("model_type")
                )),
            }
        }
    }
}

#[cfg(test)]
mod tests;
