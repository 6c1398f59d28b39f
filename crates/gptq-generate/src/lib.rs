//! Text from a checkpoint, dense or quantized, token by token.
//!
//! Reading order: [`Settings`] says how to choose and when to stop; [`Sampler`] turns logits into a
//! choice; [`Stops`] watches the text; [`generate`] runs prompts and gives [`Reply`] for each.

#![forbid(unsafe_code)]

mod error;
mod sampler;
mod session;
mod stops;

pub use error::GenerateError;
pub use sampler::{Choice, Sampler};
pub use session::{Finish, Next, Prompt, Reply, Settings, generate};
pub use stops::Stops;
