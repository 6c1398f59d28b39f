//! The CUDA engine's device operations.
//!
//! Dense products use cuBLAS and factorizations cuSOLVER, on Burn's own device memory and on the
//! stream of Burn's kernels; operations that no library has are kernels here, one file each.
//! Activations and weights are all f16 or all bf16, depending on the model: an operation follows
//! its inputs. Sums are f32; the Gram matrix, its factor and everything that determines a code are
//! f32 throughout.
//!
//! Make device tensors on the thread that computes with them: CubeCL gives each thread its own
//! stream, and a buffer that is freed on one stream while another still reads it is reused too
//! early.

mod context;
mod error;
mod failures;
mod kernel_cache;
mod kernel_store;
mod library;

mod blas;
mod buffer;
mod communicator;
mod nccl;
mod nvrtc;
mod stream;
mod transfer;

mod gram;
mod linear;

mod arrange;
mod cholesky;
mod factor;
mod groups;
mod pack;
mod panels;
mod refine;
mod relative_error;
mod solve;
mod sweep;
mod target;
mod tune;

mod engine;

mod attention;
mod attention_kind;
mod attention_mma;
mod attention_wgmma;
mod decode_attention;
mod embedding;
mod experts;
mod norm;
mod packed_linear;
mod packed_rows;
mod rotary;
mod step;
mod step_launch;
mod step_plan;
mod swiglu;

mod attention_backward;
mod backward;
mod divergence;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub use attention::causal_attention;
pub use attention_backward::attention_backward;
pub use backward::{geglu_backward, norm_backward, swiglu_backward};
pub use cholesky::Failed;
pub use decode_attention::attend_next;
pub use divergence::{compare_logits, divergence_gradient};
pub use embedding::embedding;
pub use error::Error;
pub use error::install_panic_hook;
pub(crate) use error::{fail, run_guarded};
pub use experts::{combine, route};
pub use gram::{cross_add, cross_add_each, gram_add, gram_add_each, gram_zeros};
pub use kernel_cache::keep_kernels;
pub(crate) use kernel_cache::{open as open_kernels, seal as seal_kernels};
pub use library::MissingLibrary;
pub(crate) use library::{device_count, missing_library};
pub use linear::{input_gradient, linear, linear_each, weight_gradient};
pub use norm::{norm_f32, rms_norm};
pub(crate) use pack::Fetched;
pub use pack::dequantize;
pub use packed_linear::packed_linear;
pub use packed_rows::resident;
pub use relative_error::relative_error;
pub use rotary::{partial_rotary, rotary};
pub use solve::solve;
pub(crate) use stream::settle;
pub use swiglu::{geglu, swiglu};
pub(crate) use transfer::Pinned;

pub use crate::backends::Cuda;

/// A CUDA device, by ordinal.
pub type Device = burn_cuda::CudaDevice;
