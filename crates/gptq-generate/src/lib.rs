//! Text generation from a checkpoint, dense or quantized, token by token.
//!
//! Reading order: [`GenerateOptions`] holds sampling and stopping options; [`Sampler`] chooses a token
//! from logits; [`Stops`] watches the text; [`generate`] runs prompts and returns a [`Reply`] for
//! each.

#![forbid(unsafe_code)]

mod error;
mod sampler;
mod session;
mod stops;

pub use error::GenerateError;
pub use sampler::{Sampler, TokenChoice};
pub use session::{Finish, GenerateOptions, Next, Prompt, Reply, generate};
pub use stops::Stops;
