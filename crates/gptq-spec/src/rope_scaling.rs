//! What a config makes of the rotary frequencies: their base, and how they are stretched, by its
//! `rope_type`.
//!
//! Transformers 4 has `rope_theta` at the top and `rope_scaling` for the rest, Transformers 5 all of it in
//! `rope_parameters`. What Transformers 5 makes of both (`convert_rope_params_to_dict`): a `rope_scaling`
//! that says anything replaces `rope_parameters` as a whole; the base is that inside of it, else the one at the
//! top; `rope_type` goes before `type`, its older name.

use std::f32::consts::PI;

use serde_json::{Map, Value, json};

use crate::config::max_positions;
use crate::keys::Keys;

/// How rotary frequencies are stretched for contexts longer than those first trained on
/// (Transformers' `modeling_rope_utils.py`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency is divided.
    Linear {
        /// By this.
        factor: f64,
    },
    /// Llama 3.1's: with `turns` a frequency's turns in the first context, it is divided where
    /// `turns < low_freq_factor`, stays where `turns > high_freq_factor`, and goes from the one to
    /// the other, linearly in `turns`, between them.
    Llama3 {
        /// What slow frequencies are divided by.
        factor: f64,
        /// Turns below which a frequency is slow.
        low_freq_factor: f64,
        /// Turns above which a frequency is fast.
        high_freq_factor: f64,
        /// The first context, in tokens.
        original_positions: f64,
    },
}

/// Values of `rope_type`.
const TYPES: [&str; 3] = ["default", "linear", "llama3"];

/// The base where no key says it.
const DEFAULT_THETA: f64 = 10_000.0;

/// Of Llama 3's scaling, the context that was trained on first.
const ORIGINAL: &str = "original_max_position_embeddings";

/// The object that counts, if either does.
fn rope<'a>(config: &Keys<'a>) -> Result<Option<Keys<'a>>, String> {
    match config.inside("rope_scaling")? {
        Some(rope) => Ok(Some(rope)),
        None => config.inside("rope_parameters"),
    }
}

/// The base of the rotary frequencies and their scaling; the error is a sentence.
pub(crate) fn rotary(
    config: &Keys<'_>,
    max_positions: usize,
) -> Result<(f64, RopeScaling), String> {
    let empty = Map::new();
    let rope = rope(config)?.unwrap_or(Keys::new(&empty));
    if let Some((layers, _)) = rope
        .iter()
        .find(|(key, it)| it.is_object() && key.ends_with("_attention"))
    {
        let name = rope.name(layers);
        return Err(format!(
            "{name}: rotary settings of their own for some blocks are not supported"
        ));
    }
    let theta = match rope.value("rope_theta") {
        Some(_) => positive(&rope, "rope_theta")?,
        None => positive(config, "rope_theta")?,
    };
    let scaling = scaling(config, &rope, max_positions)?;
    if scaling != RopeScaling::Default {
        // Where there is no scaling, Transformers does not look at it in these families.
        for keys in [&rope, config] {
            let part = keys.nullable::<f64>("partial_rotary_factor")?.flatten();
            if let Some(part) = part.filter(|&part| part != 1.0) {
                let name = keys.name("partial_rotary_factor");
                return Err(format!("{name} = {part} is not supported, only 1"));
            }
        }
    }
    Ok((theta.unwrap_or(DEFAULT_THETA), scaling))
}

fn scaling(
    config: &Keys<'_>,
    rope: &Keys<'_>,
    max_positions: usize,
) -> Result<RopeScaling, String> {
    let name = match rope.value("rope_type") {
        Some(_) => "rope_type",
        None => "type",
    };
    let kind: Option<String> = rope.found(name)?;
    let kind = kind.as_deref().unwrap_or("default");
    let needed = |key: &str| {
        let missing = || {
            format!(
                "{} is missing, which rope_type {kind:?} needs",
                rope.name(key)
            )
        };
        positive(rope, key)?.ok_or_else(missing)
    };
    match kind {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear {
            factor: needed("factor")?,
        }),
        "llama3" => {
            let low_freq_factor = needed("low_freq_factor")?;
            let high_freq_factor = needed("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(format!(
                    "{} = {high_freq_factor} is not above low_freq_factor = {low_freq_factor}",
                    rope.name("high_freq_factor")
                ));
            }
            // One at the top of the file replaces that beside the factors.
            let original = match config.value(ORIGINAL) {
                Some(_) => positive(config, ORIGINAL)?,
                None => positive(rope, ORIGINAL)?,
            };
            Ok(RopeScaling::Llama3 {
                factor: needed("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_positions: original.unwrap_or(max_positions as f64),
            })
        }
        _ => Err(format!(
            "{} {kind:?} is not supported; known are: {}",
            rope.name(name),
            TYPES.join(", ")
        )),
    }
}

fn positive(keys: &Keys<'_>, key: &str) -> Result<Option<f64>, String> {
    let wrong = |value: f64| format!("{} = {value} is not positive", keys.name(key));
    match keys.found::<f64>(key)? {
        Some(value) if value > 0.0 => Ok(Some(value)),
        Some(value) => Err(wrong(value)),
        None => Ok(None),
    }
}

/// Gives `config` its rotary settings in both spellings, each complete, and with both names of the type:
/// programs read the one or the other, and Transformers 5 the same from the two together.
///
/// # Errors
/// As of [`ModelConfig::from_json`](crate::ModelConfig::from_json).
pub fn spell_out_rotary(config: &mut Map<String, Value>) -> Result<(), String> {
    let keys = Keys::new(config);
    let (theta, scaling) = rotary(&keys, max_positions(&keys)?)?;
    // As it was typed: some readers take a base that is a whole number, and some only one that is not.
    let within = rope(&keys)?.and_then(|rope| rope.value("rope_theta").cloned());
    let theta = within
        .or(keys.value("rope_theta").cloned())
        .unwrap_or(theta.into());
    let (kind, mut parameters) = match scaling {
        RopeScaling::Default => ("default", json!({})),
        RopeScaling::Linear { factor } => ("linear", json!({"factor": factor})),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_positions,
        } => {
            // Tokens: readers want a whole number.
            let original = match original_positions.fract() == 0.0 {
                true => json!(original_positions as u64),
                false => json!(original_positions),
            };
            let factors = json!({
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                ORIGINAL: original,
            });
            ("llama3", factors)
        }
    };
    parameters["rope_type"] = kind.into();
    let scaling = match scaling {
        RopeScaling::Default => Value::Null,
        _ => {
            let mut old = parameters.clone();
            old["type"] = kind.into();
            old
        }
    };
    parameters["rope_theta"] = theta.clone();
    config.insert("rope_theta".to_owned(), theta);
    config.insert("rope_scaling".to_owned(), scaling);
    config.insert("rope_parameters".to_owned(), parameters);
    Ok(())
}

impl RopeScaling {
    /// The frequency `w`, in f32 and in the order of Transformers.
    pub fn apply(self, w: f32) -> f32 {
        match self {
            RopeScaling::Default => w,
            RopeScaling::Linear { factor } => w / factor as f32,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_positions,
            } => {
                let factor = factor as f32;
                let length = 2.0 * PI / w;
                if length > (original_positions / low_freq_factor) as f32 {
                    return w / factor;
                }
                if length < (original_positions / high_freq_factor) as f32 {
                    return w;
                }
                let turns = original_positions as f32 / length;
                let range = (high_freq_factor - low_freq_factor) as f32;
                let smooth = (turns - low_freq_factor as f32) / range;
                (1.0 - smooth) * w / factor + smooth * w
            }
        }
    }
}

#[cfg(test)]
mod tests;
