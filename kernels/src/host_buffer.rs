//! Host memory for transfers of tensors at the speed of the device's link.

use std::fmt;
use std::ops::Range;

use burn::tensor::TensorData;
use gptq_format::Half;
use half::vec::{HalfBitsVecExt, HalfFloatVecExt};
use half::{bf16, f16};

use crate::cuda::Pinned;
use crate::half_of;

/// The bits of f16 or bf16 values on the host, from
/// [`Engine::host_buffer`](crate::Engine::host_buffer) or
/// [`Engine::download`](crate::Engine::download). For a CUDA device they are in page-locked memory,
/// which returns to a pool when the buffer is dropped; the pool waits for a transfer in progress.
pub struct HostBuffer {
    memory: HostMemory,
    half: Half,
}

enum HostMemory {
    Pageable(Vec<u16>),
    Pinned(Pinned),
}

impl HostBuffer {
    /// Wraps values in memory as the program usually has it.
    pub fn pageable(bits: Vec<u16>, half: Half) -> Self {
        let memory = HostMemory::Pageable(bits);
        HostBuffer { memory, half }
    }

    pub(crate) fn page_locked(pinned: Pinned, half: Half) -> Self {
        let memory = HostMemory::Pinned(pinned);
        HostBuffer { memory, half }
    }

    /// Wraps a tensor of f16 or bf16.
    pub(crate) fn from_data(data: TensorData) -> Self {
        let given = "the caller gives a tensor of f16 or bf16";
        let half = half_of(data.dtype);
        let bits = match half {
            Half::F16 => data.into_vec::<f16>().expect(given).reinterpret_into(),
            Half::Bf16 => data.into_vec::<bf16>().expect(given).reinterpret_into(),
        };
        HostBuffer::pageable(bits, half)
    }

    /// Copies some of the values.
    pub(crate) fn data<const D: usize>(
        &self,
        range: Range<usize>,
        shape: [usize; D],
    ) -> TensorData {
        let bits = self.bits()[range].to_vec();
        match self.half {
            Half::F16 => TensorData::new(bits.reinterpret_into::<f16>(), shape),
            Half::Bf16 => TensorData::new(bits.reinterpret_into::<bf16>(), shape),
        }
    }

    /// Returns the type of the values.
    pub fn half(&self) -> Half {
        self.half
    }

    /// Returns the values; waits for a transfer that writes them.
    ///
    /// Unwinds if the device fails meanwhile, as every operation of an engine does.
    pub fn bits(&self) -> &[u16] {
        match &self.memory {
            HostMemory::Pageable(bits) => bits,
            HostMemory::Pinned(pinned) => pinned.values(),
        }
    }

    /// Returns the values for writing; waits for a transfer that reads or writes them.
    pub fn bits_mut(&mut self) -> &mut [u16] {
        match &mut self.memory {
            HostMemory::Pageable(bits) => bits,
            HostMemory::Pinned(pinned) => pinned.bits_mut(),
        }
    }

    pub(crate) fn pinned(&self) -> Option<&Pinned> {
        match &self.memory {
            HostMemory::Pageable(_) => None,
            HostMemory::Pinned(pinned) => Some(pinned),
        }
    }
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.memory {
            HostMemory::Pageable(_) => "pageable",
            HostMemory::Pinned(_) => "page-locked",
        };
        write!(f, "HostBuffer({kind} {})", self.half)
    }
}
