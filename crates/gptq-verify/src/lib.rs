//! Judges a finished directory from its files alone: reopen, check every tensor against the
//! configs, dequantise, run, measure perplexity. Knows nothing of how the codes were found.

mod error;
mod perplexity;
mod structure;
mod verify;

pub use error::VerifyError;
pub use structure::Structure;
pub use verify::{Evaluation, Verdict, verify};
