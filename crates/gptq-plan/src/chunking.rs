//! Chunks of windows, and lanes that run at the same time.

use gptq_ranks::LANES;

/// Division of a run's work by an engine: its `Engine::LANES`, `Engine::CHUNK_TOKENS` and so on,
/// repeated here because a plan is made without `gptq-kernels`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunking {
    /// Chunks that run at the same time.
    pub lanes: usize,
    /// Tokens of a chunk, unless a window is longer.
    pub tokens: usize,
    /// Rows of experts' linears that are solved together, about.
    pub rows: usize,
}

impl Chunking {
    /// Chunking on the CPU.
    pub const CPU: Chunking = Chunking {
        lanes: 4,
        tokens: 4096,
        rows: 1,
    };
    /// Chunking on a CUDA device.
    pub const CUDA: Chunking = Chunking {
        lanes: 1,
        tokens: 16_384,
        rows: 32_768,
    };

    /// Gram matrices of one input that are alive together while lanes of windows are summed in a tree: those of lanes that
    /// run at the same time, and one on each level of the tree above them.
    pub fn partial_sums(self) -> usize {
        self.lanes + (LANES / self.lanes).ilog2() as usize
    }

    /// Bytes of an expert's Gram matrices, which take `bytes` in one sum, that are alive together: of a partial sum three
    /// quarters, because those that it borrows are summed after its own.
    pub(crate) fn expert_sums(self, bytes: u128) -> u128 {
        bytes * self.partial_sums() as u128 * 3 / 4
    }

    /// Windows of `seq_len` tokens in a chunk, whose transient activations are alive together.
    pub fn windows(self, seq_len: usize) -> usize {
        (self.tokens / seq_len).max(1)
    }
}
