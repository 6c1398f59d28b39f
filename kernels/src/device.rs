//! Devices of the machine, and work on the backend of one.

use std::fmt;
use std::str::FromStr;

use burn::tensor::{DType, Tensor};
use gptq_format::Half;
use thiserror::Error;

use crate::cuda::{
    Error, MissingLibrary, device_count, fail, missing_library, open_kernels, run_guarded,
    seal_kernels, settle,
};
use crate::{Cpu, Cuda, Engine, Scores, host_attention, host_floats};

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

    fn cast<const D: usize>(x: Tensor<Self, D>, dtype: DType) -> Tensor<Self, D> {
        host_floats::cast(x, dtype)
    }

    fn causal_attention(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        scores: Scores,
    ) -> Tensor<Self, 3> {
        host_attention::causal_attention(q, k, v, scores)
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
    #[error(
        "{text:?} is not a list of devices; valid are auto, cpu, cuda, cuda:N, cuda:all, and lists such as cuda:0,1"
    )]
    UnknownList { text: String },
    #[error("cuda:{index} is listed twice; name each device once")]
    Twice { index: usize },
    #[error(
        "local rank {rank} of a launcher has no device: {count} are there for the ranks of this host; start at most as many, \
         or none with a rank of its own (CUDA_VISIBLE_DEVICES)"
    )]
    NoneLeft { rank: usize, count: usize },
}

/// Devices as asked for on the command line, a rank on each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Devices {
    /// One device; if a launcher starts a process for each rank, `cuda` and `auto` stand for its own.
    One(Device),
    /// The CUDA devices of these indices.
    Cuda(Vec<usize>),
    /// Every CUDA device.
    AllCuda,
}

impl Devices {
    /// Returns the devices of this process's ranks, which are checked to exist.
    ///
    /// # Errors
    /// A device that does not exist, or cannot be used.
    pub fn resolve(&self) -> Result<Vec<Device>, DeviceError> {
        let resolved =
            |indices: Vec<usize>| indices.into_iter().map(|it| Device::Cuda(it).resolve());
        match self {
            Devices::One(device) => Ok(vec![device.resolve()?]),
            Devices::Cuda(indices) => resolved(indices.clone()).collect(),
            Devices::AllCuda => {
                let count = cuda_devices().map_err(|reason| DeviceError::NoCuda { reason })?;
                resolved((0..count).collect()).collect()
            }
        }
    }

    /// Returns the device of a process that a launcher has started as the `local_rank`-th of its host, which is checked to
    /// exist.
    ///
    /// # Errors
    /// More ranks than devices, or a device that does not exist or cannot be used.
    pub fn of_local_rank(&self, local_rank: usize) -> Result<Device, DeviceError> {
        let listed = match self {
            Devices::One(Device::Cpu) => return Ok(Device::Cpu),
            Devices::One(Device::Auto) if cuda_devices().is_err() => return Ok(Device::Cpu),
            Devices::Cuda(indices) => Some(&indices[..]),
            Devices::One(_) | Devices::AllCuda => None,
        };
        let count = cuda_devices().map_err(|reason| DeviceError::NoCuda { reason })?;
        Device::Cuda(device_of_rank(listed, count, local_rank)?).resolve()
    }

    /// Returns the one that stands for all where one device is enough.
    pub fn first(&self) -> Device {
        match self {
            Devices::One(device) => *device,
            Devices::Cuda(indices) => Device::Cuda(indices.first().copied().unwrap_or_default()),
            Devices::AllCuda => Device::Cuda(0),
        }
    }
}

/// Returns the index of a local rank's device, of those `listed` or of all `count`. A launcher that shows each process one
/// device has chosen it.
fn device_of_rank(
    listed: Option<&[usize]>,
    count: usize,
    rank: usize,
) -> Result<usize, DeviceError> {
    match listed {
        Some(listed) => listed.get(rank).copied().ok_or(DeviceError::NoneLeft {
            rank,
            count: listed.len(),
        }),
        None if count == 1 => Ok(0),
        None if rank < count => Ok(rank),
        None => Err(DeviceError::NoneLeft { rank, count }),
    }
}

impl FromStr for Devices {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unknown = || DeviceError::UnknownList { text: text.into() };
        let Some(list) = text.strip_prefix("cuda:") else {
            return text.parse().map(Devices::One).map_err(|_| unknown());
        };
        if list == "all" {
            return Ok(Devices::AllCuda);
        }
        let mut indices = Vec::new();
        for index in list.split(',') {
            let index: usize = index.parse().map_err(|_| unknown())?;
            if indices.contains(&index) {
                return Err(DeviceError::Twice { index });
            }
            indices.push(index);
        }
        Ok(match indices[..] {
            [index] => Devices::One(Device::Cuda(index)),
            _ => Devices::Cuda(indices),
        })
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Devices::One(device) => device.fmt(f),
            Devices::AllCuda => f.write_str("cuda:all"),
            Devices::Cuda(indices) => {
                let indices: Vec<String> = indices.iter().map(usize::to_string).collect();
                write!(f, "cuda:{}", indices.join(","))
            }
        }
    }
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
    fn lists_of_devices_parse_as_they_print_and_name_each_once() {
        for text in [
            "auto",
            "cpu",
            "cuda:0",
            "cuda:all",
            "cuda:0,1",
            "cuda:3,0,2,1",
        ] {
            assert_eq!(text.parse::<Devices>().unwrap().to_string(), text);
        }
        assert_eq!("cuda:2".parse(), Ok(Devices::One(Device::Cuda(2))));
        assert_eq!(
            "cuda:1,1".parse::<Devices>(),
            Err(DeviceError::Twice { index: 1 })
        );
        for text in [
            "gpu", "cuda:", "cuda:0,", "cuda:0-3", "cuda:x", "cpu,cpu", "",
        ] {
            let error = text.parse::<Devices>().unwrap_err();
            assert!(matches!(error, DeviceError::UnknownList { .. }), "{text}");
        }
    }

    #[test]
    fn a_local_rank_has_a_device_of_its_own() {
        assert_eq!(device_of_rank(None, 4, 2), Ok(2));
        assert_eq!(device_of_rank(Some(&[3, 1]), 4, 1), Ok(1));
        // As srun shows them with one GPU for each task.
        assert_eq!(device_of_rank(None, 1, 5), Ok(0));
        let error = device_of_rank(None, 2, 2).unwrap_err().to_string();
        assert!(
            error.starts_with("local rank 2 of a launcher has no device: 2 are there"),
            "{error}"
        );
        assert!(device_of_rank(Some(&[0, 1]), 4, 2).is_err());
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
