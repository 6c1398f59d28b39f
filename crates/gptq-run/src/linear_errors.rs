//! Errors of a linear layer's output relative to the dense model's.

use crate::moved::LOST;

/// Errors of a linear layer against the dense model's output.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct LinearErrors {
    pub(crate) output: f64,
    /// Error with weights rounded to nearest.
    pub(crate) nearest: f64,
}

/// Relative error of a layer; with zero dense output, any output at all is an error.
pub(crate) fn part(lost: f64, energy: f64) -> f64 {
    match lost {
        0.0 => 0.0,
        lost => bounded(lost / energy),
    }
}

/// Replaces a number that is not finite by that of an output a thousand times its original length.
pub(crate) fn bounded(error: f64) -> f64 {
    match error < LOST {
        true => error,
        false => LOST,
    }
}
