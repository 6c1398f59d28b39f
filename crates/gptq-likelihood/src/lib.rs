//! Log-likelihoods of continuations under a model, dense or quantized.
//!
//! Reading order: [`log_likelihoods`] takes the requests of a task to a device; `forest.rs` finds the prompts that they
//! share, `chunks.rs` cuts them into what goes through a block at once, and `pass.rs` takes these through the model, block by
//! block.

#![forbid(unsafe_code)]

mod chunks;
mod error;
mod forest;
mod pass;
mod run;

pub use error::LikelihoodError;
pub use run::log_likelihoods;

#[cfg(test)]
mod golden;
