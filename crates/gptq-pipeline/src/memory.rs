//! What a run holds at once, from shapes alone.

use gptq_model::{Projection, Stage};

use crate::{Plan, Propagation};

/// Peak memory in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// On the device of a CUDA run.
    pub device: u64,
    /// On the host beside it.
    pub host: u64,
    /// On the host of a CPU run.
    pub cpu: u64,
}

/// Windows whose transient activations are alive together; see `run`.
pub(crate) fn chunk_windows(seq_len: usize) -> usize {
    (4096 / seq_len).max(1)
}

impl Memory {
    /// Hidden states of every branch and one branch's activations in f16; a block dense and
    /// quantised; the largest Gram matrix with its factors; one chunk's transients. A CPU run
    /// computes in f32 and factors in f64.
    pub(crate) fn of(plan: &Plan) -> Memory {
        let config = &plan.config;
        let tokens = plan.tokens() as u64;
        let streams = match plan.propagation {
            Propagation::Quantised => plan.branches.len() as u64,
            Propagation::Dense => 1,
        };
        let hidden = config.hidden_size as u64;
        let widest = Stage::ALL
            .iter()
            .map(|stage| stage.in_features(config) as u64)
            .max()
            .unwrap_or(hidden);
        let states = streams * tokens * hidden * 2 + tokens * widest * 2;
        let block: u64 = Projection::ALL
            .iter()
            .map(|p| p.shape(config))
            .map(|(n_in, n_out)| (n_in * n_out) as u64)
            .sum();
        let table = config.vocabulary as u64 * hidden;
        let chunk = (chunk_windows(plan.calibration.seq_len) * plan.calibration.seq_len) as u64;
        let transients = chunk * (hidden * 6 + widest * 4);
        let program = 100 << 20;
        let on_host = 2 * block * 2 + tokens * 4 + program;
        Memory {
            device: states + (2 * block + table + transients) * 2 + 4 * widest * widest * 4,
            host: on_host,
            cpu: states
                + (2 * block).max(table) * 4
                + transients * 4
                + 4 * widest * widest * 8
                + on_host,
        }
    }
}
