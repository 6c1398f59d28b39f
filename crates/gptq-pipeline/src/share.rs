//! Which calibration tokens outputs are compared with the dense model's on.

use serde::{Deserialize, Serialize};

/// Of how many tokens one is compared: the dense forward, the branch's own, and the products of a linear
/// are each that part of the run's forward (`crates/README.md` has figures).
pub(crate) const SHARE: usize = 256;
/// Least tokens of a window.
const LEAST: usize = 256;
/// Tokens of a window that is not taken whole are a multiple of this.
const STEP: usize = 64;

/// The calibration tokens that output errors are measured on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Windows, evenly spaced from the first.
    pub windows: usize,
    /// The first tokens of each.
    pub tokens: usize,
}

impl Share {
    /// Of so many calibration windows of a length.
    pub(crate) fn of(samples: usize, seq_len: usize) -> Share {
        let part = samples * seq_len / SHARE / STEP * STEP;
        Share {
            windows: samples.div_ceil(SHARE),
            tokens: part.max(LEAST).min(seq_len),
        }
    }
}
