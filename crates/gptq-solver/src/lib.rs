//! GPTQ on the CPU, generic over f32 and f64: the reference that every faster path is tested
//! against.
//!
//! For a linear with weights `W [out, in]` whose inputs have the Gram matrix `H = XᵀX [in, in]`,
//! find codes whose dequantized weights `Q` keep `‖(W - Q)X‖²` small, one column at a time, each
//! column's rounding error folded into the columns not yet rounded (Frantar et al., 2022).
//!
//! Reading order: [`Settings`] says what is wanted, [`Grid`] is a group's scale and zero,
//! [`Factor`] is the one factorisation of `H`, [`solve`] is the column sweep, and
//! [`refine`] goes over the codes again with all of them known, and [`output_energy`] measures what
//! came out. [`Target`] is what to round instead of `W` when the inputs have drifted, and [`Gains`] says
//! what such options were good for.

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
mod target;

pub use energy::output_energy;
pub use error::SolverError;
pub use factor::{Factor, MAX_DAMPING, dead_columns, raised};
pub use gains::Gains;
pub use grid::{Grid, scale_factors};
pub use refine::refine;
pub use settings::{Real, Settings};
pub use solve::{Solution, round_to_nearest, solve};
pub use target::Target;
