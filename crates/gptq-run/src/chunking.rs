//! Chunking of a run's windows by an engine, as a plan assumes it.

use gptq_kernels::Engine;
use gptq_plan::Chunking;

/// The engine's chunking.
pub(crate) fn chunking<B: Engine>() -> Chunking {
    Chunking {
        lanes: B::LANES,
        tokens: B::CHUNK_TOKENS,
        rows: B::BATCH_ROWS,
    }
}

#[cfg(test)]
mod tests {
    use gptq_kernels::{Cpu, Cuda};

    use super::*;

    #[test]
    fn plans_reckon_with_the_engines_own_chunks() {
        assert_eq!(chunking::<Cpu>(), Chunking::CPU);
        assert_eq!(chunking::<Cuda>(), Chunking::CUDA);
    }
}
