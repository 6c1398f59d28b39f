//! Judges a finished directory from its files alone: reopen, check every tensor against the configs
//! and the digests its maker recorded, dequantise, run beside the dense model, and leave a receipt.
//! Knows nothing of how the codes were found.
//!
//! Reading order: [`Request`] says what to check and what to tolerate, [`verify`] does it, and
//! [`Receipt`] is what comes of it.

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
mod receipt;
mod recorded;
mod structure;
mod verify;

pub use error::VerifyError;
pub use gptq_format::FileDigest;
pub use receipt::{BlockError, Check, Perplexity, RECEIPT, Receipt, failures};
pub use verify::{Asked, Evaluation, Request, Tolerances, check_tensors, verify};
