//! Multiple-choice tasks, without running a model: questions from files, prompts, requests for log-likelihoods, and
//! what comes of these, as lm-evaluation-harness does it.
//!
//! Reading order: [`Task`] is read from a file in one of several [`TaskLayout`]s, as [`TaskOptions`] say; [`Encoder`] makes the
//! [`ChoiceRequest`]s of its questions; [`Pick`] and [`TaskScore`] are what a model's log-likelihoods come to, and [`Paired`]
//! compares two models; [`TaskResults`] is the record in a branch's directory, with [`HarnessResult`]s beside it.
//!
//! Source: lm_eval 0.4.13, `api/task.py` (prompts, metrics), `api/model.py` and `models/huggingface.py` (requests).

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

mod context_length;
mod encode;
mod error;
mod harness;
mod layout;
mod layouts;
mod paired;
mod prompt;
mod question;
mod record;
mod score;
mod task;

pub use context_length::context_length;
pub use encode::{ChoiceRequest, EncodedTask, Encoder};
pub use error::EvalError;
pub use harness::{HarnessResult, read_harness};
pub use layout::TaskLayout;
pub use paired::Paired;
pub use question::Question;
pub use record::{DenseScore, TASK_RESULTS, TaskRecord, TaskResults};
pub use score::{Pick, Proportion, TaskScore};
pub use task::{Task, TaskOptions};
