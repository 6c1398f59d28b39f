//! What can go wrong in a device operation, and how it leaves one.
//!
//! Burn's operations return tensors and panic when the device fails. The engine's do the same, by
//! [`fail`], which unwinds with an [`Error`] and prints nothing; [`run_guarded`] catches it at the
//! one place where a backend is entered.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use burn::tensor::DType;

use super::library::MissingLibrary;
use crate::{Device, DeviceError};

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
    /// An allocation that the device has no room for.
    #[error("out of device memory at an allocation of {bytes} bytes")]
    OutOfMemory {
        /// What was asked for.
        bytes: u64,
    },
    /// The runtime under Burn reported another error.
    #[error("device runtime: {0}")]
    Runtime(String),
    /// The stream that the runtime works on could not be found.
    #[error("the device runtime does not show the stream it works on")]
    Stream,
    /// The damped Gram matrix has no Cholesky factor at any damping up to the limit.
    #[error("the Gram matrix is not positive definite, even with damping {damping}")]
    NotPositiveDefinite {
        /// The last damping tried, as a fraction of the mean diagonal.
        damping: f64,
    },
    /// The Gram matrix holds an infinity or a NaN.
    #[error("the Gram matrix's diagonal is not finite at column {column}")]
    NotFinite {
        /// The first such column.
        column: usize,
    },
}

/// How the runtime under Burn begins its message when memory runs out.
const TOO_BIG: &str = "can't allocate buffer of size: ";

impl Error {
    /// From the runtime's message, whose later lines are a backtrace.
    pub(crate) fn runtime(message: &str) -> Self {
        match allocation(message) {
            Some(bytes) => Self::OutOfMemory { bytes },
            None => Self::Runtime(message.lines().next().unwrap_or_default().to_owned()),
        }
    }

    fn on(self, device: Device) -> DeviceError {
        match self {
            Self::Library(missing) => DeviceError::Missing(missing),
            Self::OutOfMemory { bytes } => DeviceError::OutOfMemory { device, bytes },
            error => DeviceError::Failed {
                device,
                reason: error.to_string(),
            },
        }
    }
}

/// The size of the allocation that a message says there was no room for.
fn allocation(message: &str) -> Option<u64> {
    let rest = &message[message.find(TOO_BIG)? + TOO_BIG.len()..];
    let end = rest.find(|c: char| !c.is_ascii_digit());
    rest[..end.unwrap_or(rest.len())].parse().ok()
}

/// Leaves a device operation that failed.
pub(crate) fn fail(error: Error) -> ! {
    resume_unwind(Box::new(error))
}

/// Does `work`, whose device failures become errors; any other panic goes on.
pub(crate) fn run_guarded<T>(device: Device, work: impl FnOnce() -> T) -> Result<T, DeviceError> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| {
        let payload = match payload.downcast::<Error>() {
            Ok(error) => return error.on(device),
            Err(payload) => payload,
        };
        // Burn's own panic where an allocation fails under one of its operations.
        match payload
            .downcast_ref::<String>()
            .and_then(|it| allocation(it))
        {
            Some(bytes) => DeviceError::OutOfMemory { device, bytes },
            None => resume_unwind(payload),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_failure_becomes_an_error_and_a_bug_stays_a_panic() {
        let device = Device::Cuda(1);
        assert_eq!(run_guarded(device, || 5), Ok(5));
        let message = "can't allocate buffer of size: 4096\n  0: somewhere";
        let found = run_guarded(device, || -> u8 { fail(Error::runtime(message)) });
        let expected = Err(DeviceError::OutOfMemory {
            device,
            bytes: 4096,
        });
        assert_eq!(found, expected);
        let found = run_guarded(device, || -> u8 { fail(Error::Stream) });
        assert!(found.unwrap_err().to_string().starts_with("cuda:1: "));
        let bug = catch_unwind(|| run_guarded(device, || resume_unwind(Box::new("a bug"))));
        assert!(matches!(bug, Err(payload) if payload.downcast_ref() == Some(&"a bug")));
    }
}
