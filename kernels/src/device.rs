//! Devices of the machine, and work on the backend of one.

use std::fmt;
use std::str::FromStr;

use burn::tensor::DType;
use gptq_format::Half;
use thiserror::Error;

use crate::cuda::{
    Error, MissingLibrary, device_count, fail, missing_library, open_kernels, run_guarded,
    seal_kernels, settle,
};
use crate::{Cpu, Cuda, Engine};

impl Engine for Cpu {
    const LANES: usize = 4;
    const STRIP: Option<usize> = Some(gptq_solver::STRIP);

    fn compute(_half: Half) -> DType {
        DType::F32
    }

    fn state_half(_half: Half, wide: bool) -> Half {
        match wide {
            true => Half::Bf16,
            false => Half::F16,
        }
    }
}

/// A device as asked for on the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// CUDA where there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this index.
    Cuda(usize),
}

/// Something to do on whichever backend a [`Device`] names.
pub trait Work {
    /// Result of the work.
    type Output;

    /// Does it on one backend.
    fn run<B: Engine>(self, device: B::Device) -> Self::Output;
}

/// Reasons that a device cannot be used.
#[derive(Debug, Error, PartialEq)]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum DeviceError {
    #[error("no CUDA device: {reason}; use --device cpu, or install the NVIDIA driver")]
    NoCuda { reason: String },
    #[error("cuda:{index}: there are {count} CUDA device(s), numbered from 0")]
    NoSuchIndex { index: usize, count: usize },
    #[error("{0}, or use --device cpu")]
    Missing(MissingLibrary),
    #[error("{device}: out of device memory at {place}")]
    OutOfMemory { device: Device, place: String },
    #[error("{device}: {reason}")]
    Failed { device: Device, reason: String },
    #[error("{text:?} is not a device; valid are auto, cpu, cuda and cuda:N")]
    Unknown { text: String },
}

impl DeviceError {
    /// Converts a failure of `device`.
    pub(crate) fn of(device: Device, error: Error) -> Self {
        match error {
            Error::Library(missing) => DeviceError::Missing(missing),
            error => match error.without_memory() {
                Some(place) => DeviceError::OutOfMemory { device, place },
                None => DeviceError::Failed {
                    device,
                    reason: error.to_string(),
                },
            },
        }
    }
}

impl Device {
    /// Turns `Auto` into what this machine has, and checks that an explicit choice exists.
    pub fn resolve(self) -> Result<Device, DeviceError> {
        match self {
            Device::Cpu => Ok(Device::Cpu),
            Device::Auto => match cuda_devices() {
                // A GPU that cannot be used for want of a library is said, not passed over.
                Ok(_) => Device::Cuda(0).resolve(),
                Err(_) => Ok(Device::Cpu),
            },
            Device::Cuda(index) => match cuda_devices() {
                Ok(count) if index >= count => Err(DeviceError::NoSuchIndex { index, count }),
                Ok(_) => match missing_library() {
                    None => Ok(self),
                    Some(missing) => Err(DeviceError::Missing(missing)),
                },
                Err(reason) => Err(DeviceError::NoCuda { reason }),
            },
        }
    }

    /// Does `work` on this device's backend; `Auto` is the CPU here, so [`Device::resolve`] first.
    ///
    /// # Errors
    /// A CUDA device that fails under way, such as by running out of memory.
    pub fn run<W: Work>(self, work: W) -> Result<W::Output, DeviceError> {
        match self {
            Device::Auto | Device::Cpu => Ok(work.run::<Cpu>(Default::default())),
            Device::Cuda(index) => {
                open_kernels();
                let work = || {
                    let done = work.run::<Cuda>(burn_cuda::CudaDevice::new(index));
                    settle(index).unwrap_or_else(|error| fail(error));
                    done
                };
                let done =
                    run_guarded(index, work).map_err(|error| DeviceError::of(self, error))?;
                seal_kernels();
                Ok(done)
            }
        }
    }
}

/// Returns the number of CUDA devices that the driver reports, at least one. The driver is loaded here,
/// at run time; without it this is an error, not a crash.
fn cuda_devices() -> Result<usize, String> {
    match device_count()? {
        0 => Err("the driver reports none".into()),
        count => Ok(count),
    }
}

impl FromStr for Device {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || DeviceError::Unknown { text: text.into() };
        match text {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(0)),
            _ => {
                let index = text.strip_prefix("cuda:").ok_or_else(unknown)?;
                Ok(Device::Cuda(index.parse().map_err(|_| unknown())?))
            }
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_parse_as_they_print() {
        for text in ["auto", "cpu", "cuda:0", "cuda:3"] {
            assert_eq!(text.parse::<Device>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        for text in ["gpu", "cuda:", "cuda:x", ""] {
            assert!(text.parse::<Device>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_machine_without_a_driver_has_the_cpu() {
        assert_eq!(Device::Cpu.resolve(), Ok(Device::Cpu));
        if cuda_devices().is_err() {
            assert_eq!(Device::Auto.resolve(), Ok(Device::Cpu));
            let error = Device::Cuda(0).resolve().unwrap_err().to_string();
            assert!(error.starts_with("no CUDA device"), "{error}");
        }
    }
}
