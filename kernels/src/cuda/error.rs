//! What can go wrong in a device operation, and how it leaves one.
//!
//! Burn's operations return tensors and panic when the device fails. The engine's do the same, by
//! [`fail`], which unwinds with an [`Error`] and prints nothing; [`run_guarded`] catches it at the
//! one place where a backend is entered.

use std::collections::BTreeMap;
use std::panic::{self, AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use burn::tensor::DType;
use cudarc::cublas::{result::CublasError, sys::cublasStatus_t};
use cudarc::cusolver::{result::CusolverError, sys::cusolverStatus_t};
use cudarc::driver::{DriverError, sys::CUresult};

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
    #[error("{operation}: cuBLAS: {:?}", source.0)]
    Cublas {
        /// The routine that was called.
        operation: &'static str,
        /// The status that it returned.
        source: CublasError,
    },
    /// cuSOLVER refused a call.
    #[error("{operation}: cuSOLVER: {:?}", source.0)]
    Cusolver {
        /// The routine that was called.
        operation: &'static str,
        /// The status that it returned.
        source: CusolverError,
    },
    /// The CUDA driver refused a call.
    #[error("{operation}: CUDA driver: {:?}", source.0)]
    Driver {
        /// The call that failed.
        operation: &'static str,
        /// The driver's error.
        source: DriverError,
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
    /// The stream that the runtime works on could not be found, or is not what the driver says it should be.
    #[error(
        "the stream that the device runtime works on cannot be told ({why}); this build has another CubeCL than \
         it was written for: build gptq with --locked"
    )]
    Stream {
        /// What is wrong with it.
        why: &'static str,
    },
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
            Self::OutOfMemory { bytes } => denied(device, bytes),
            // A library's own workspace, whose size it does not tell.
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
            } => DeviceError::OutOfMemory {
                device,
                place: operation.to_owned(),
            },
            error => DeviceError::Failed {
                device,
                reason: error.to_string(),
            },
        }
    }
}

fn denied(device: Device, bytes: u64) -> DeviceError {
    DeviceError::OutOfMemory {
        device,
        place: format!("an allocation of {bytes} bytes"),
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

/// The allocations that devices' threads could not make, in bytes, by the device's index. CubeCL panics on
/// such a thread, and all that its callers get from then on is that the thread is gone.
static DENIED: Mutex<BTreeMap<usize, u64>> = Mutex::new(BTreeMap::new());

fn denied_on() -> MutexGuard<'static, BTreeMap<usize, u64>> {
    DENIED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Installs a panic hook that notes which device's thread ran out of memory, so that [`Device::run`] can tell
/// that from other failures; every panic is reported as before. For programs, at their start, after hooks of
/// their own: without it, a device that runs out of memory is told as one that failed.
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

/// The device that the current thread is CubeCL's for: `DS{stage}-{type}-{index}`.
fn device_of_thread() -> Option<usize> {
    let thread = std::thread::current();
    let name = thread.name()?.strip_prefix("DS")?;
    name.rsplit('-').next()?.parse().ok()
}

/// Does `work`, whose device failures become errors; any other panic goes on.
pub(crate) fn run_guarded<T>(device: Device, work: impl FnOnce() -> T) -> Result<T, DeviceError> {
    let denied_here = || match device {
        Device::Cuda(index) => denied_on().remove(&index),
        Device::Auto | Device::Cpu => None,
    };
    // What an earlier run on it met is told already.
    denied_here();
    let done = catch_unwind(AssertUnwindSafe(work));
    let bytes = denied_here();
    done.map_err(|payload| match (bytes, payload.downcast::<Error>()) {
        (Some(bytes), _) => denied(device, bytes),
        (None, Ok(error)) => error.on(device),
        (None, Err(payload)) => resume_unwind(payload),
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
        assert_eq!(found, Err(denied(device, 4096)));
        // On CubeCL's thread, of which the caller sees no more than that it ended.
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
        // Another device's thread, and one that is no device's.
        for thread in ["DSD-0-0", "reader"] {
            let line = gone(thread).unwrap_err().to_string();
            assert!(line.contains("CallError"), "{line}");
        }
        // What a run got over does not count against the next one, nor hide a bug in it.
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
