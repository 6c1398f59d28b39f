//! GPTQ on the CPU, generic over f32 and f64: the reference for testing every faster path.
//!
//! For a linear layer with weights `W [out, in]` whose inputs have the Gram matrix `H = XᵀX [in,
//! in]`, finds codes whose dequantized weights `Q` keep `‖(W - Q)X‖²` small, one column at a time,
//! each column's rounding error folded into the columns not yet rounded (Frantar et al., 2022).
//!
//! Reading order: [`Settings`] holds the options, [`Grid`] is a group's scale and zero point,
//! [`Factor`] is the factorization of `H`, [`solve`] is the column sweep, [`refine`] improves the
//! codes once all are known, and [`output_energy`] measures the result. [`Target`] computes the
//! weights to round in place of `W` if the inputs differ from the dense model's, and [`Gains`]
//! holds the gains of these options. All of them take rows in strips of [`STRIP`], which do not
//! depend on each other.

#![forbid(unsafe_code)]

mod cholesky;
mod energy;
mod error;
mod factor;
mod gains;
mod grid;
mod refine;
mod settings;
mod solve;
mod strip;
mod target;

pub use energy::{output_energies, output_energy};
pub use error::SolverError;
pub use factor::{Factor, MAX_DAMPING, dead_columns, raised};
pub use gains::Gains;
pub use grid::{Grid, scale_factors};
pub use refine::{Refined, refine};
pub use settings::{Real, Settings};
pub use solve::{Solution, round_to_nearest, solve};
pub use strip::STRIP;
pub use target::Target;
