//! How an engine divides a run's windows, as a plan reckons with it.

use gptq_kernels::Engine;
use gptq_plan::Chunking;

/// The engine's chunking.
pub(crate) fn chunking<B: Engine>() -> Chunking {
    Chunking {
        lanes: B::LANES,
        tokens: B::CHUNK_TOKENS,
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
