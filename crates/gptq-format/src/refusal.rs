//! Why a format cannot hold a linear layer.

use thiserror::Error;

/// Reason that a format cannot hold a linear.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{reason}; {remedy}")]
pub struct Refusal {
    /// Rule that fails, if any.
    pub reason: String,
    /// Change to a recipe that avoids it.
    pub remedy: String,
}
