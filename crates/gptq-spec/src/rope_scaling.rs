//! Scaling of rotary frequencies, and the resulting frequencies, as in Transformers (`modeling_rope_utils.py`).

use std::f32::consts::PI;
use std::f64;
use std::sync::Arc;

/// Scaling of rotary frequencies for contexts longer than those first trained on
/// (Transformers' `modeling_rope_utils.py`).
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// Every frequency is divided.
    Linear {
        /// Divisor of the frequencies.
        factor: f64,
    },
    /// Llama 3.1's: with `turns` a frequency's turns in the first context, it is divided where
    /// `turns < low_freq_factor`, stays where `turns > high_freq_factor`, and in between is interpolated
    /// linearly in `turns`.
    Llama3 {
        /// Divisor of slow frequencies.
        factor: f64,
        /// Turns below which a frequency is slow.
        low_freq_factor: f64,
        /// Turns above which a frequency is fast.
        high_freq_factor: f64,
        /// The first context, in tokens.
        original_positions: f64,
    },
    /// The base grows with the text, once that is longer than the context trained on.
    Dynamic {
        /// Rate at which the base grows.
        factor: f64,
        /// The context trained on, in tokens.
        positions: f64,
    },
    /// Frequencies with fewer than `slow` turns in the first context are divided, those with more than `fast`
    /// stay, and those in between are interpolated linearly in the frequency's index.
    Yarn {
        /// Divisor of slow frequencies.
        factor: f64,
        /// Turns above which a frequency stays.
        fast: f64,
        /// Turns below which it is divided.
        slow: f64,
        /// The first context, in tokens.
        original_positions: f64,
        /// Factor of cosines and sines.
        attention_factor: f64,
        /// True if the indices between which frequencies are interpolated are rounded outwards.
        truncate: bool,
    },
    /// Each frequency is divided by a factor of its own, one for texts as long as the first context and another
    /// for longer ones.
    LongRope {
        /// Divisors for texts up to the first context.
        short: Arc<[f32]>,
        /// Divisors for longer texts.
        long: Arc<[f32]>,
        /// The first context, in tokens.
        original_positions: f64,
        /// Factor of cosines and sines.
        attention_factor: f64,
    },
}

/// Values of `rope_type`.
pub(crate) const KINDS: &[&str] = &["default", "linear", "dynamic", "yarn", "longrope", "llama3"];

impl RopeScaling {
    /// The frequencies of `dim` features of base `theta` in a text of `length` tokens, in f32 and in the order of
    /// Transformers.
    pub fn frequencies(&self, theta: f64, dim: usize, length: usize) -> Vec<f32> {
        let plain = |theta: f64, i: usize| theta.powf(-2.0 * i as f64 / dim as f64) as f32;
        let theta = match *self {
            RopeScaling::Dynamic { factor, positions } => {
                let length = (length as f64).max(positions);
                let growth = factor * length / positions - (factor - 1.0);
                theta * growth.powf(dim as f64 / (dim as f64 - 2.0))
            }
            _ => theta,
        };
        let all = (0..dim / 2).map(|i| (i, plain(theta, i)));
        match self {
            RopeScaling::Default | RopeScaling::Dynamic { .. } => all.map(|(_, w)| w).collect(),
            RopeScaling::Linear { factor } => all.map(|(_, w)| w / *factor as f32).collect(),
            RopeScaling::Llama3 { .. } => all.map(|(_, w)| self.llama3(w)).collect(),
            RopeScaling::Yarn { .. } => {
                let (low, high) = self.yarn_range(theta, dim);
                let share = |i: usize| ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                all.map(|(i, w)| self.yarn(w, share(i))).collect()
            }
            RopeScaling::LongRope {
                short,
                long,
                original_positions,
                ..
            } => {
                let factors = match length as f64 > *original_positions {
                    true => long,
                    false => short,
                };
                all.map(|(i, w)| w / factors[i]).collect()
            }
        }
    }

    /// Factor of cosines and sines.
    pub fn attention_factor(&self) -> f64 {
        match *self {
            RopeScaling::Yarn {
                attention_factor, ..
            }
            | RopeScaling::LongRope {
                attention_factor, ..
            } => attention_factor,
            _ => 1.0,
        }
    }

    /// Returns true if keys rotated for a text of one of these lengths, in tokens, are the same for the
    /// other.
    pub fn agrees(&self, one: usize, other: usize) -> bool {
        match *self {
            RopeScaling::LongRope {
                original_positions, ..
            } => {
                [one, other].map(|it| it as f64 > original_positions) == [false; 2]
                    || [one, other].map(|it| it as f64 > original_positions) == [true; 2]
            }
            _ => true,
        }
    }

    /// The indices of frequencies between which [`RopeScaling::Yarn`] goes from staying to dividing.
    fn yarn_range(&self, theta: f64, dim: usize) -> (f32, f32) {
        let RopeScaling::Yarn {
            fast,
            slow,
            original_positions,
            truncate,
            ..
        } = *self
        else {
            return (0.0, 1.0);
        };
        let index = |turns: f64| {
            let length = original_positions / (turns * 2.0 * f64::consts::PI);
            dim as f64 * length.ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (index(fast), index(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        (low as f32, high as f32)
    }

    /// The frequency `w`, of which `share` is divided.
    fn yarn(&self, w: f32, share: f32) -> f32 {
        match *self {
            RopeScaling::Yarn { factor, .. } => {
                let kept = 1.0 - share;
                w / factor as f32 * (1.0 - kept) + w * kept
            }
            _ => w,
        }
    }

    fn llama3(&self, w: f32) -> f32 {
        let RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_positions,
        } = *self
        else {
            return w;
        };
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
