//! Judges a finished directory from its files alone: reopen, check every tensor against the configs
//! and the digests its maker recorded, dequantize, run beside the dense model, and leave a receipt.
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
mod nearest;
mod range;
mod receipt;
mod recorded;
mod structure;
mod tolerance;
mod verify;
mod weights;

pub use error::VerifyError;
pub use gptq_format::FileDigest;
pub use range::{Overflow, Range};
pub use receipt::{
    BlockError, Check, Depth, NearestRounding, Perplexity, RECEIPT, Receipt, failures,
};
pub use tolerance::{Asked, Tolerances};
pub(crate) use verify::check;
pub use verify::{Evaluation, RANGE, Request, check_tensors, perplexity, verify};
