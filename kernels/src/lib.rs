//! Device operations for quantisation and the forward pass.

/// The CUDA engine's operations.
pub mod cuda;
