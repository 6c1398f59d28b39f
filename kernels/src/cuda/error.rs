//! Errors of device operations, and how they are propagated.
//!
//! Burn's operations return tensors and panic if the device fails. The engine's do the same with
//! [`fail`], which unwinds with an [`Error`] without printing; [`run_guarded`] catches it at the
//! single place where a backend is entered.

use std::collections::BTreeMap;
use std::panic::{self, AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use burn::tensor::DType;
use cudarc::cublas::{result::CublasError, sys::cublasStatus_t};
use cudarc::cusolver::{result::CusolverError, sys::cusolverStatus_t};
use cudarc::driver::{DriverError, sys::CUresult};

use super::library::MissingLibrary;

/// An error of a device operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A shared library of the CUDA toolkit or the driver is not installed.
    #[error(transparent)]
    Library(#[from] MissingLibrary),
    /// A tensor has the wrong element type.
    #[error("{operation}: {tensor} has dtype {found:?}, not {expected:?}")]
    Dtype {
        /// Operation that was called.
        operation: &'static str,
        /// Name of the tensor.
        tensor: &'static str,
        /// Expected dtype.
        expected: DType,
        /// Actual dtype.
        found: DType,
    },
    /// Shapes that are inconsistent or not supported by the operation.
    #[error("{operation}: {reason}")]
    Shape {
        /// Operation that was called.
        operation: &'static str,
        /// The shapes, and why they do not fit.
        reason: String,
    },
    /// cuBLAS refused a call.
    #[error("{operation}: cuBLAS: {:?}", source.0)]
    Cublas {
        /// Routine that was called.
        operation: &'static str,
        /// Status returned.
        source: CublasError,
    },
    /// cuSOLVER refused a call.
    #[error("{operation}: cuSOLVER: {:?}", source.0)]
    Cusolver {
        /// Routine that was called.
        operation: &'static str,
        /// Status returned.
        source: CusolverError,
    },
    /// The CUDA driver refused a call.
    #[error("{operation}: CUDA driver: {:?}", source.0)]
    Driver {
        /// Call that failed.
        operation: &'static str,
        /// Error of the driver.
        source: DriverError,
    },
    /// A kernel written in CUDA C++ did not compile.
    #[error("{kernel}: NVRTC: {log}")]
    Compile {
        /// Name of the kernel.
        kernel: &'static str,
        /// Log of the compiler.
        log: String,
    },
    /// The device has no memory for an allocation.
    #[error("out of device memory at an allocation of {bytes} bytes")]
    OutOfMemory {
        /// Requested size in bytes.
        bytes: u64,
    },
    /// The runtime under Burn reported another error.
    #[error("device runtime: {0}")]
    Runtime(String),
    /// The stream of the runtime was not found, or does not belong to the device.
    #[error(
        "cannot determine the stream of the device runtime ({why}); this build uses a different CubeCL version than \
         expected: build gptq with --locked"
    )]
    Stream {
        /// Reason.
        why: &'static str,
    },
    /// The Gram matrix has no Cholesky factor with any damping up to the limit.
    #[error("the Gram matrix is not positive definite, even with damping {damping}")]
    NotPositiveDefinite {
        /// Last damping tried, as a fraction of the mean diagonal.
        damping: f64,
    },
    /// The Gram matrix holds an infinity or a NaN.
    #[error("the Gram matrix's diagonal is not finite at column {column}")]
    NotFinite {
        /// First such column.
        column: usize,
    },
}

/// Beginning of the runtime's message for an allocation failure.
const TOO_BIG: &str = "can't allocate buffer of size: ";

impl Error {
    /// Converts the runtime's message, whose later lines are a backtrace.
    pub(crate) fn runtime(message: &str) -> Self {
        match allocation(message) {
            Some(bytes) => Self::OutOfMemory { bytes },
            None => Self::Runtime(message.lines().next().unwrap_or_default().to_owned()),
        }
    }

    /// Returns where memory was lacking, if that is what failed.
    pub(crate) fn without_memory(&self) -> Option<String> {
        match self {
            Self::OutOfMemory { bytes } => Some(format!("an allocation of {bytes} bytes")),
            // A library's own workspace of unknown size.
            Self::Cublas {
                operation,
                source: CublasError(cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED),
            }
            | Self::Cusolver {
                operation,
                source: CusolverError(cusolverStatus_t::CUSOLVER_STATUS_ALLOC_FAILED),
            }
            | Self::Driver {
                operation,
                source: DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY),
            } => Some((*operation).to_owned()),
            _ => None,
        }
    }
}

/// Parses the size of a failed allocation from a message.
fn allocation(message: &str) -> Option<u64> {
    let rest = &message[message.find(TOO_BIG)? + TOO_BIG.len()..];
    let end = rest.find(|c: char| !c.is_ascii_digit());
    rest[..end.unwrap_or(rest.len())].parse().ok()
}

/// Leaves a failed device operation.
pub(crate) fn fail(error: Error) -> ! {
    resume_unwind(Box::new(error))
}

/// Failed allocations of device threads in bytes, by device index. CubeCL panics on such a thread,
/// and its callers only see that the thread has ended.
static DENIED: Mutex<BTreeMap<usize, u64>> = Mutex::new(BTreeMap::new());

fn denied_on() -> MutexGuard<'static, BTreeMap<usize, u64>> {
    DENIED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Installs a panic hook that records which device's thread ran out of memory, so that
/// [`Device::run`](crate::Device::run) can distinguish that from other failures; panics are still reported as before.
/// Programs call it at startup, after installing their own hooks; without it, a device without
/// memory is reported as failed.
pub fn install_panic_hook() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            let bytes = panic.payload_as_str().and_then(allocation);
            if let (Some(bytes), Some(device)) = (bytes, device_of_thread()) {
                denied_on().insert(device, bytes);
            }
            report(panic);
        }));
    });
}

/// Returns the device that the current thread serves for CubeCL: `DS{stage}-{type}-{index}`.
fn device_of_thread() -> Option<usize> {
    let thread = std::thread::current();
    let name = thread.name()?.strip_prefix("DS")?;
    name.rsplit('-').next()?.parse().ok()
}

/// Runs `work` on the CUDA device of this index and converts its device failures to errors; other
/// panics continue.
pub(crate) fn run_guarded<T>(device: usize, work: impl FnOnce() -> T) -> Result<T, Error> {
    let denied_here = || denied_on().remove(&device);
    // Discards failures of an earlier run, which are already reported.
    denied_here();
    let done = catch_unwind(AssertUnwindSafe(work));
    let bytes = denied_here();
    done.map_err(|payload| match (bytes, payload.downcast::<Error>()) {
        (Some(bytes), _) => Error::OutOfMemory { bytes },
        (None, Ok(error)) => *error,
        (None, Err(payload)) => resume_unwind(payload),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, DeviceError};

    fn run_guarded<T>(device: Device, work: impl FnOnce() -> T) -> Result<T, DeviceError> {
        let Device::Cuda(index) = device else {
            panic!("a CUDA device");
        };
        super::run_guarded(index, work).map_err(|error| DeviceError::of(device, error))
    }

    fn denied(device: Device, bytes: u64) -> DeviceError {
        DeviceError::of(device, Error::OutOfMemory { bytes })
    }

    #[test]
    fn a_device_failure_becomes_an_error_and_a_bug_stays_a_panic() {
        let device = Device::Cuda(1);
        assert_eq!(run_guarded(device, || 5), Ok(5));
        let message = "can't allocate buffer of size: 4096\n  0: somewhere";
        let found = run_guarded(device, || -> u8 { fail(Error::runtime(message)) });
        assert_eq!(found, Err(denied(device, 4096)));
        // On CubeCL's thread, whose caller only sees that it ended.
        install_panic_hook();
        let lost = |thread: &str, message: String| {
            let thread = std::thread::Builder::new().name(thread.to_owned());
            let lost = thread.spawn(move || panic!("{message}")).unwrap();
            assert!(lost.join().is_err());
        };
        let too_big = || format!("unwrap on {TOO_BIG}8192\n  0: somewhere");
        let gone = |thread: &str| {
            run_guarded(device, || -> u8 {
                lost(thread, too_big());
                fail(Error::runtime("CallError"))
            })
        };
        assert_eq!(gone("DSD-0-1"), Err(denied(device, 8192)));
        // Another device's thread, and one that serves no device.
        for thread in ["DSD-0-0", "reader"] {
            let line = gone(thread).unwrap_err().to_string();
            assert!(line.contains("CallError"), "{line}");
        }
        // A failure that a run recovered from does not count against the next one, nor hide a bug
        // in it.
        assert_eq!(run_guarded(device, || lost("DSD-0-1", too_big())), Ok(()));
        let next = run_guarded(device, || -> u8 { fail(Error::runtime("CallError")) });
        assert!(matches!(next, Err(DeviceError::Failed { .. })), "{next:?}");
        let bug = catch_unwind(|| {
            lost("DSD-0-1", too_big());
            run_guarded(device, || -> u8 { panic!("a bug") })
        });
        assert!(bug.is_err());
        let failed = || Error::Cublas {
            operation: "cublasCreate",
            source: CublasError(cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED),
        };
        let found = run_guarded(device, || -> u8 { fail(failed()) }).unwrap_err();
        assert!(matches!(&found, DeviceError::OutOfMemory { .. }), "{found}");
        let found = run_guarded(device, || -> u8 {
            fail(Error::Stream { why: "it is null" })
        });
        assert!(found.unwrap_err().to_string().starts_with("cuda:1: "));
        let bug = catch_unwind(|| run_guarded(device, || resume_unwind(Box::new("a bug"))));
        assert!(matches!(bug, Err(payload) if payload.downcast_ref() == Some(&"a bug")));
    }
}
