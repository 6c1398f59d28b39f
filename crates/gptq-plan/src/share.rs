//! The calibration tokens used for comparing outputs with the dense model's.

use serde::{Deserialize, Serialize};

/// Stride: one in this many tokens is compared. The dense forward, the branch's own and the
/// products of a linear layer each take that share of the run's forward (`crates/README.md` has
/// figures).
pub const SHARE: usize = 256;
/// Calibration tokens that are also run through the dense model where a branch corrects the mismatch of its
/// activations. More tell little more, and a real model needs as many (`crates/gptq-solver/ACCURACY.md`).
const DENSE_TOKENS: usize = 1 << 17;
/// Calibration tokens of a step of tuning, in whole windows, at most.
const STEP_TOKENS: usize = 8192;
/// Minimum number of steps that take each token once: the steps of fewer tokens are smaller, so that they are not
/// learned by heart, nor gone through for nothing.
const STEPS_OF_ALL: usize = 16;
/// Minimum number of tokens of a window.
const LEAST: usize = 256;
/// The tokens taken from a partial window are a multiple of this.
const STEP: usize = 64;

/// The calibration tokens used for output errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Number of windows, evenly spaced from the first.
    pub windows: usize,
    /// Number of tokens from the start of each.
    pub tokens: usize,
}

impl Share {
    /// Chooses the tokens for a number of calibration windows and their length.
    pub(crate) fn of(samples: usize, seq_len: usize) -> Share {
        let part = samples * seq_len / SHARE / STEP * STEP;
        Share {
            windows: samples.div_ceil(SHARE),
            tokens: part.max(LEAST).min(seq_len),
        }
    }
}

/// Returns the stride for which every so-many-th chunk of `tokens` tokens makes at least [`DENSE_TOKENS`].
pub(crate) fn dense_step(tokens: usize) -> usize {
    (tokens / DENSE_TOKENS).max(1)
}

/// Returns the windows of `seq_len` tokens in a step of tuning on `tokens`.
pub(crate) fn step_windows(tokens: usize, seq_len: usize) -> usize {
    let windows = tokens / seq_len;
    let share = windows.div_ceil(STEPS_OF_ALL);
    (STEP_TOKENS / seq_len).min(share).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dense_model_runs_on_all_tokens_up_to_a_number_and_on_a_share_beyond() {
        for (tokens, step) in [(4096, 1), (127 * 1024, 1), (256 * 1024, 2), (128 * 4096, 4)] {
            assert_eq!(dense_step(tokens), step);
        }
    }

    #[test]
    fn a_step_of_tuning_takes_a_sixteenth_of_the_tokens_up_to_a_number() {
        for (tokens, seq_len, windows) in [
            (131_072, 4096, 2),
            (127 * 1024, 1024, 8),
            (131_072, 1024, 8),
            (32 * 512, 512, 2),
            (4 * 512, 512, 1),
            (131_072, 16_384, 1),
        ] {
            assert_eq!(step_windows(tokens, seq_len), windows, "{tokens}");
        }
    }

    #[test]
    fn about_one_token_in_256_is_compared_and_never_less_than_a_short_window() {
        for (samples, seq_len, windows, tokens) in [
            (128, 4096, 1, 2048),
            (128, 1024, 1, 512),
            (256, 1024, 1, 1024),
            (257, 1024, 2, 1024),
            (64, 4096, 1, 1024),
            (16, 512, 1, 256),
            (8, 128, 1, 128),
            (100, 1000, 1, 384),
            (1, 1, 1, 1),
        ] {
            assert_eq!(Share::of(samples, seq_len), Share { windows, tokens });
        }
    }
}
