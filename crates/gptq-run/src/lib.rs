//! The run: a plan carried out on a device.
//!
//! Reading order: [`quantize`] is the driver; blocks in order, streams of hidden states that branches
//! share until they differ, Gram matrices of their inputs, the writer and the journal follow from it.

#![forbid(unsafe_code)]

mod agreement;
mod block_loop;
mod block_tuning;
mod branch_progress;
mod branch_writer;
mod chunking;
mod disk_space;
mod error;
mod event;
mod expert_errors;
mod expert_grams;
mod fingerprint;
mod finish;
mod gathered;
mod gram;
mod gram_sums;
mod hidden_range;
mod host_link;
mod journal;
mod lanes;
mod linear_errors;
mod measure;
mod model_files;
mod moved;
mod on_threads;
mod options;
mod output_errors;
mod peers;
mod probe;
mod profile;
mod program;
mod quantize;
mod rank_sums;
mod read_ahead;
mod replay;
mod resume;
mod row_parts;
mod run;
mod saved_states;
mod scratch;
mod solve;
mod solve_shares;
mod solve_tap;
mod solved_tap;
mod sources;
mod states;
mod stream;
mod tap_weights;
mod tuning;
mod tuning_loss;
mod tuning_states;
mod write_behind;

pub use error::RunError;
pub use event::Event;
pub use hidden_range::Overflow;
pub use on_threads::quantize_on_threads;
pub use options::RunOptions;
pub use profile::{Phase, Profile};
pub use quantize::{Outcome, quantize};
pub use resume::unfinished;
