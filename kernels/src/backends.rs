//! The backend type of each kind of device.

use half::f16;

/// The CPU backend: Burn's Flex, measured faster than NdArray in every operation (`crates/README.md`).
pub type Cpu = burn_flex::Flex;
/// The CUDA backend, f16 floats (bf16 where a model is taken so) and i32 integers by default, without fusion or autotuning:
/// kernels are chosen here, not at run time.
pub type Cuda = burn_cuda::Cuda<f16, i32>;
