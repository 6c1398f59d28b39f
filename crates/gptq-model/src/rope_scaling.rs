//! What a config makes of the rotary frequencies, by its `rope_type`.

use std::f32::consts::PI;

use crate::config::RawRope;

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

/// The scaling that a config asks for; the error is a sentence.
pub(crate) fn scaling(rope: &RawRope, max_positions: usize) -> Result<RopeScaling, String> {
    let kind = rope.rope_type.as_deref().unwrap_or("default");
    let positive = |name: &str, value: Option<f64>| match value {
        Some(value) if value.is_finite() && value > 0.0 => Ok(value),
        Some(value) => Err(format!("{name} = {value} is not positive")),
        None => Err(format!("rope_type {kind:?} has no {name}")),
    };
    let factor = || positive("factor", rope.factor);
    match kind {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "llama3" => {
            let low_freq_factor = positive("low_freq_factor", rope.low_freq_factor)?;
            let high_freq_factor = positive("high_freq_factor", rope.high_freq_factor)?;
            if high_freq_factor <= low_freq_factor {
                return Err(format!(
                    "high_freq_factor = {high_freq_factor} is not above low_freq_factor = \
                     {low_freq_factor}"
                ));
            }
            let original = rope.original_max_position_embeddings;
            Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor,
                high_freq_factor,
                original_positions: positive(
                    "original_max_position_embeddings",
                    original.or(Some(max_positions as f64)),
                )?,
            })
        }
        _ => Err(format!(
            "rope_type {kind:?} is not supported; known are: {}",
            TYPES.join(", ")
        )),
    }
}

impl RopeScaling {
    /// The frequency `w`, in f32 and in the order of Transformers.
    pub(crate) fn apply(self, w: f32) -> f32 {
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
