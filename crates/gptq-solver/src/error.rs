//! The one error type of this crate.

use thiserror::Error;

/// Why a linear could not be solved. The caller knows its name and adds it.
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
