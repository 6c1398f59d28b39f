//! Verifies a finished directory from its files alone: reopens it, checks every tensor against the
//! configs and the recorded digests, dequantizes, runs it beside the dense model, and writes a
//! verification report. Shares no code with the solver.
//!
//! Reading order: [`VerifyOptions`] says what to check and what to tolerate, [`verify`] does it, and
//! [`Receipt`](gptq_plan::Receipt) is the result.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

mod compare;
mod error;
mod gguf;
mod nearest;
mod range;
mod recorded;
mod same_weights;
mod structure;
mod tolerance;
mod verify;
mod weights;

pub use error::VerifyError;
pub use gguf::check_gguf;
pub use tolerance::Asked;
pub use verify::{Evaluation, RANGE, VerifyOptions, check_tensors, perplexity, verify};
