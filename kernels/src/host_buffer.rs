//! Host memory that tensors are brought to and from, at the speed of the device's link.

use std::fmt;
use std::ops::Range;

use burn::tensor::{DType, TensorData};
use gptq_format::Half;
use half::vec::{HalfBitsVecExt, HalfFloatVecExt};
use half::{bf16, f16};

use crate::cuda::Pinned;

/// f16 or bf16 values on the host, of [`Engine::host_buffer`](crate::Engine::host_buffer) or
/// [`Engine::download`](crate::Engine::download), by their bits. For a CUDA device they are in
/// page-locked memory, which goes back to a pool when the buffer is dropped: a transfer still under way
/// is not disturbed, because the pool waits for it.
pub struct HostBuffer {
    memory: Memory,
    half: Half,
}

enum Memory {
    Pageable(Vec<u16>),
    Pinned(Pinned),
}

/// A 16-bit float as Burn names it.
pub fn dtype(half: Half) -> DType {
    match half {
        Half::F16 => DType::F16,
        Half::Bf16 => DType::BF16,
    }
}

/// The inverse of [`dtype`].
pub fn half_of(dtype: DType) -> Half {
    match dtype {
        DType::BF16 => Half::Bf16,
        _ => Half::F16,
    }
}

impl HostBuffer {
    pub(crate) fn pageable(bits: Vec<u16>, half: Half) -> Self {
        let memory = Memory::Pageable(bits);
        HostBuffer { memory, half }
    }

    pub(crate) fn page_locked(pinned: Pinned, half: Half) -> Self {
        let memory = Memory::Pinned(pinned);
        HostBuffer { memory, half }
    }

    /// Of a tensor of f16 or bf16.
    pub(crate) fn from_data(data: TensorData) -> Self {
        let given = "the caller gives a tensor of f16 or bf16";
        let half = half_of(data.dtype);
        let bits = match half {
            Half::F16 => data.into_vec::<f16>().expect(given).reinterpret_into(),
            Half::Bf16 => data.into_vec::<bf16>().expect(given).reinterpret_into(),
        };
        HostBuffer::pageable(bits, half)
    }

    /// Some of the values.
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

    /// The values' type.
    pub fn half(&self) -> Half {
        self.half
    }

    /// The values; waits for a transfer that writes them.
    ///
    /// A device that fails meanwhile unwinds, as in every operation of an engine.
    pub fn bits(&self) -> &[u16] {
        match &self.memory {
            Memory::Pageable(bits) => bits,
            Memory::Pinned(pinned) => pinned.values(),
        }
    }

    /// The values, to be written; waits for a transfer that reads or writes them.
    pub fn bits_mut(&mut self) -> &mut [u16] {
        match &mut self.memory {
            Memory::Pageable(bits) => bits,
            Memory::Pinned(pinned) => pinned.bits_mut(),
        }
    }

    pub(crate) fn pinned(&self) -> Option<&Pinned> {
        match &self.memory {
            Memory::Pageable(_) => None,
            Memory::Pinned(pinned) => Some(pinned),
        }
    }
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.memory {
            Memory::Pageable(_) => "pageable",
            Memory::Pinned(_) => "page-locked",
        };
        write!(f, "HostBuffer({kind} {})", self.half)
    }
}
