//! What can go wrong in a device operation.

use burn::tensor::DType;

use super::library::MissingLibrary;

/// An error of a device operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A shared library of the CUDA toolkit or the driver is not installed.
    #[error(transparent)]
    Library(#[from] MissingLibrary),
    /// A tensor has another element type than the operation takes.
    #[error("{operation}: {tensor} has dtype {found:?}, not {expected:?}")]
    Dtype {
        /// The operation that was called.
        operation: &'static str,
        /// Which of its tensors.
        tensor: &'static str,
        /// The dtype that it takes.
        expected: DType,
        /// The dtype that it got.
        found: DType,
    },
    /// Shapes that do not fit together, or that the operation does not support.
    #[error("{operation}: {reason}")]
    Shape {
        /// The operation that was called.
        operation: &'static str,
        /// Which shapes, and why they do not fit.
        reason: String,
    },
    /// cuBLAS refused a call.
    #[error("{operation}: cuBLAS: {source}")]
    Cublas {
        /// The routine that was called.
        operation: &'static str,
        /// The status that it returned.
        source: cudarc::cublas::result::CublasError,
    },
    /// cuSOLVER refused a call.
    #[error("{operation}: cuSOLVER: {source}")]
    Cusolver {
        /// The routine that was called.
        operation: &'static str,
        /// The status that it returned.
        source: cudarc::cusolver::result::CusolverError,
    },
    /// The CUDA driver refused a call.
    #[error("{operation}: CUDA driver: {source}")]
    Driver {
        /// The call that failed.
        operation: &'static str,
        /// The driver's error.
        source: cudarc::driver::DriverError,
    },
    /// A kernel written in CUDA C++ did not compile.
    #[error("{kernel}: NVRTC: {log}")]
    Compile {
        /// The kernel's name.
        kernel: &'static str,
        /// The compiler's log.
        log: String,
    },
    /// The runtime under Burn reported an error, such as device memory running out.
    #[error("device runtime: {0}")]
    Runtime(String),
    /// The stream that the runtime works on could not be found.
    #[error("the device runtime does not show the stream it works on")]
    Stream,
    /// The damped Gram matrix has no Cholesky factor at any damping up to the limit.
    #[error(
        "the Gram matrix is not positive definite, even with damping {damping} \
         (pivot {pivot} failed)"
    )]
    NotPositiveDefinite {
        /// The last damping tried, as a fraction of the mean diagonal.
        damping: f64,
        /// The first pivot that failed, counted from one in the order of elimination.
        pivot: i32,
    },
    /// The Gram matrix holds an infinity or a NaN.
    #[error("the Gram matrix's diagonal is not finite at column {column}")]
    NotFinite {
        /// The first such column.
        column: usize,
    },
    /// A zero point of 0 cannot be stored as zero - 1.
    #[error("asymmetric quantisation needs the true-zero layout (checkpoint format gptq_v2)")]
    AsymmetricNeedsV2,
}
