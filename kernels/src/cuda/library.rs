//! Detects CUDA's shared libraries without a panic.
//!
//! The libraries are loaded at run time, so that one binary runs on machines with and without a
//! GPU. cudarc panics when it first calls into a missing library, so [`missing_library`] and
//! `device_count` check first.

use cudarc::{cublas, cusolver, driver, nvrtc};

/// A shared library that the CUDA engine needs but that is not installed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{library} is missing: install {package}")]
pub struct MissingLibrary {
    /// Name of the library for the loader.
    pub library: &'static str,
    /// Packages that contain it.
    pub package: &'static str,
}

/// Returns the first needed library that cannot be opened, or `None`.
///
/// Checks the driver first, then NVRTC, the toolkit's headers (the runtime under Burn compiles its
/// kernels against them), cuBLAS and cuSOLVER.
pub(crate) fn missing_library() -> Option<MissingLibrary> {
    // SAFETY: each check opens the library and closes it again; their initialisers have no
    // preconditions.
    let present = unsafe {
        [
            driver::sys::is_culib_present(),
            nvrtc::sys::is_culib_present(),
            headers_present(),
            cublas::sys::is_culib_present(),
            cusolver::sys::is_culib_present(),
        ]
    };
    let needed = [
        (
            "libcuda.so.1",
            "NVIDIA's driver (Debian: libcuda1; NVIDIA: cuda-drivers)",
        ),
        (
            "libnvrtc.so",
            "NVRTC (NVIDIA: cuda-nvrtc-13-0 or -12-x; PyPI: nvidia-cuda-nvrtc)",
        ),
        (
            "cuda_runtime.h",
            "the toolkit's headers (NVIDIA: cuda-cudart-dev-13-0 or -12-x; Debian: \
             nvidia-cuda-dev) and set CUDA_PATH if they are not under /usr/local/cuda",
        ),
        (
            "libcublas.so",
            "cuBLAS (NVIDIA: libcublas-13-0 or -12-x; PyPI: nvidia-cublas)",
        ),
        (
            "libcusolver.so",
            "cuSOLVER (NVIDIA: libcusolver-13-0 or -12-x; PyPI: nvidia-cusolver)",
        ),
    ];
    needed
        .into_iter()
        .zip(present)
        .find(|(_, present)| !present)
        .map(|((library, package), _)| MissingLibrary { library, package })
}

/// Returns the number of CUDA devices; an error, not a crash, without a driver.
pub(crate) fn device_count() -> Result<usize, String> {
    // SAFETY: opens the driver's library and closes it again.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err("libcuda.so is not installed".into());
    }
    driver::result::init()
        .and_then(|()| driver::result::device::get_count())
        .map(|count| usize::try_from(count).unwrap_or(0))
        .map_err(|error| format!("the driver failed to initialize ({:?})", error.0))
}

fn headers_present() -> bool {
    cubecl::cuda::install::cuda_path()
        .is_some_and(|path| path.join("include/cuda_runtime.h").exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_has_no_devices_and_no_panic() {
        // SAFETY: see `device_count`.
        let driver = unsafe { driver::sys::is_culib_present() };
        if !driver {
            assert!(device_count().is_err());
            assert_eq!(missing_library().map(|it| it.library), Some("libcuda.so.1"));
        }
        if device_count().is_ok_and(|count| count > 0) {
            assert_eq!(missing_library(), None);
        }
    }
}
