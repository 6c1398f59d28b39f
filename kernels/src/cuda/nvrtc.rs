//! Kernels written in CUDA C++: compiled by NVRTC at first use, cached as PTX, loaded by the driver.

use std::ffi::{CStr, CString, c_void};

use cudarc::{
    driver::{
        result as driver,
        sys::{CUfunction, CUmodule},
    },
    nvrtc::result as nvrtc,
};

use super::{
    context::refused,
    error::Error,
    kernel_cache::{compute_capability, kept},
    stream::Libraries,
};

/// A source of kernels.
pub(crate) struct CudaSource {
    /// Its name in errors.
    pub(crate) name: &'static str,
    /// CUDA C++.
    pub(crate) text: &'static str,
}

impl CudaSource {
    /// Returns the module compiled with these macros for a device, which is never unloaded. Its PTX is
    /// cached as `file`, which names the macros. Runs on the device thread.
    pub(crate) fn load(
        &self,
        device: usize,
        file: &str,
        macros: &[(&str, usize)],
    ) -> Result<CUmodule, Error> {
        let (major, minor) = compute_capability(device)?;
        self.load_for(&format!("{major}{minor}"), file, macros)
    }

    /// Does the same for an architecture, such as `90a`, whose instructions no other has.
    pub(crate) fn load_for(
        &self,
        architecture: &str,
        file: &str,
        macros: &[(&str, usize)],
    ) -> Result<CUmodule, Error> {
        let include = cubecl::cuda::install::include_path();
        let mut options = vec![format!("--gpu-architecture=compute_{architecture}")];
        options.extend(
            macros
                .iter()
                .map(|(name, value)| format!("-D{name}={value}")),
        );
        options.push(format!("--include-path={}", include.display()));
        let ptx = kept(file, || self.compile(&options))?;
        // The driver reads up to the NUL, wherever the bytes came from.
        let ptx = CStr::from_bytes_until_nul(&ptx).map_err(|_| Error::Compile {
            kernel: self.name,
            log: "its PTX does not end".to_owned(),
        })?;
        // SAFETY: the PTX ends in a NUL.
        unsafe { driver::module::load_data(ptx.as_ptr().cast()) }
            .map_err(refused("cuModuleLoadData"))
    }

    /// Compiles to PTX, NUL-terminated.
    fn compile(&self, options: &[String]) -> Result<Vec<u8>, Error> {
        let failed = |log: String| Error::Compile {
            kernel: self.name,
            log,
        };
        let text = CString::new(self.text).expect("a source without NUL");
        let program =
            nvrtc::create_program(&text, None).map_err(|error| failed(format!("{:?}", error.0)))?;
        // SAFETY: the program was just made and is destroyed once, below.
        unsafe {
            let result = match nvrtc::compile_program(program, options) {
                Ok(()) => nvrtc::get_ptx(program)
                    .map(|ptx| ptx.into_iter().map(|byte| byte as u8).collect())
                    .map_err(|error| failed(format!("{:?}", error.0))),
                Err(error) => {
                    let log = nvrtc::get_program_log(program).unwrap_or_default();
                    let log: Vec<u8> = log.iter().map(|&byte| byte as u8).collect();
                    Err(failed(format!(
                        "{:?}: {}",
                        error.0,
                        String::from_utf8_lossy(&log).trim_end_matches('\0')
                    )))
                }
            };
            nvrtc::destroy_program(program).map_err(|error| failed(format!("{:?}", error.0)))?;
            result
        }
    }
}

/// Returns a kernel of a module.
pub(crate) fn function(module: CUmodule, name: &'static str) -> Result<CUfunction, Error> {
    let name = CString::new(name).expect("a name without NUL");
    // SAFETY: modules are never unloaded.
    unsafe { driver::module::get_function(module, name) }.map_err(refused("cuModuleGetFunction"))
}

/// Size of a launch: blocks of the grid, threads of a block, dynamic shared memory in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Launch {
    pub(crate) blocks: (u32, u32, u32),
    pub(crate) threads: u32,
    pub(crate) shared: u32,
}

/// Launches a kernel on the stream of Burn's.
///
/// # Safety
///
/// The parameters must be those of the kernel's signature, and what they point to on the device must have the
/// sizes that they say.
pub(crate) unsafe fn launch(
    libraries: &Libraries,
    function: CUfunction,
    launch: Launch,
    parameters: &mut [*mut c_void],
) -> Result<(), Error> {
    let Launch {
        blocks,
        threads,
        shared,
    } = launch;
    let threads = (threads, 1, 1);
    // SAFETY: the caller guarantees the parameters, which the driver copies before it returns.
    unsafe {
        driver::launch_kernel(
            function,
            blocks,
            threads,
            shared,
            libraries.stream,
            parameters,
        )
    }
    .map_err(refused("cuLaunchKernel"))
}
