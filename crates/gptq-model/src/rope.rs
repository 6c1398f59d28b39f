//! Rotary tables: `angle(position, i) = position * w_i` for `i` in `0..dim / 2`, where
//! `w_i = theta^(-2i / dim)` or that as [`RopeScaling`] stretches it.

use std::f32::consts::PI;
use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{DType, Tensor, TensorData};
use gptq_kernels::Engine;

use crate::ModelConfig;
use crate::config::Rope;

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
pub(crate) fn scaling(rope: &Rope, max_positions: usize) -> Result<RopeScaling, String> {
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
    fn apply(self, w: f32) -> f32 {
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

/// The last tables asked for; blocks ask for the same ones, one after the other. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Tables<B: Engine>(Arc<Mutex<Option<Held<B>>>>);

#[derive(Clone, Debug)]
struct Held<B: Engine> {
    /// First position and number of positions.
    at: (usize, usize),
    cos: Tensor<B, 2>,
    sin: Tensor<B, 2>,
}

impl<B: Engine> Default for Tables<B> {
    fn default() -> Self {
        Tables(Arc::default())
    }
}

impl<B: Engine> Tables<B> {
    /// `(cos, sin)`, f32 `[seq, head_dim / 2]`, for the positions from `start`.
    pub(crate) fn get(
        &self,
        config: &ModelConfig,
        start: usize,
        seq: usize,
        device: &B::Device,
    ) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (start, seq);
        if last.as_ref().is_none_or(|held| held.at != at) {
            let (cos, sin) = tables(config, at, device);
            *last = Some(Held { at, cos, sin });
        }
        let held = last.as_ref().expect("just filled");
        (held.cos.clone(), held.sin.clone())
    }
}

/// `(cos, sin)`, f32 `[seq, head_dim / 2]`, for the positions from `start`.
///
/// Frequencies and angles are rounded to f32 one after the other, as Transformers does: at position
/// 4096 an unrounded angle would differ from the trained model's by more than an f32 ulp.
fn tables<B: Engine>(
    config: &ModelConfig,
    (start, seq): (usize, usize),
    device: &B::Device,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let half = config.head_dim / 2;
    let frequency = |i: usize| {
        let exponent = 2.0 * i as f64 / config.head_dim as f64;
        let w = config.rope_theta.powf(-exponent) as f32;
        config.rope_scaling.apply(w)
    };
    let frequencies: Vec<f32> = (0..half).map(frequency).collect();
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = (start..start + seq)
            .flat_map(|p| frequencies.iter().map(move |w| f64::from(p as f32 * w)))
            .map(|angle| f(angle) as f32)
            .collect();
        Tensor::from_data(TensorData::new(values, [seq, half]), (device, DType::F32))
    };
    (table(f64::cos), table(f64::sin))
}
