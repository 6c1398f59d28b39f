//! Errors of this crate.

use thiserror::Error;

/// Reason why a linear layer could not be solved. The caller adds its name.
#[derive(Debug, Error, PartialEq)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum SolverError {
    #[error("the Gram matrix of its inputs is not finite (element [{row}, {col}])")]
    NonFiniteGram { row: usize, col: usize },
    #[error(
        "the Hessian is not positive definite even with damping {tried}; use more calibration \
         tokens or a larger damp_percent"
    )]
    NotPositiveDefinite { tried: f64 },
}
