//! Host memory that tensors are brought to and from, at the speed of the device's link.

use std::fmt;

use half::f16;

use crate::cuda::Pinned;

/// f16 values on the host, of [`Engine::host_buffer`](crate::Engine::host_buffer) or
/// [`Engine::download`](crate::Engine::download). For a CUDA device they are in page-locked memory,
/// which goes back to a pool when the buffer is dropped: a transfer still under way is not disturbed,
/// because the pool waits for it.
pub struct HostBuffer(Memory);

enum Memory {
    Pageable(Vec<f16>),
    Pinned(Pinned),
}

impl HostBuffer {
    /// The values; waits for a transfer that writes them.
    ///
    /// A device that fails meanwhile unwinds, as in every operation of an engine.
    pub fn values(&self) -> &[f16] {
        match &self.0 {
            Memory::Pageable(values) => values,
            Memory::Pinned(pinned) => pinned.values(),
        }
    }

    /// The values, to be written; waits for a transfer that reads or writes them.
    pub fn values_mut(&mut self) -> &mut [f16] {
        match &mut self.0 {
            Memory::Pageable(values) => values,
            Memory::Pinned(pinned) => pinned.values_mut(),
        }
    }

    pub(crate) fn pinned(&self) -> Option<&Pinned> {
        match &self.0 {
            Memory::Pageable(_) => None,
            Memory::Pinned(pinned) => Some(pinned),
        }
    }
}

impl From<Vec<f16>> for HostBuffer {
    fn from(values: Vec<f16>) -> Self {
        HostBuffer(Memory::Pageable(values))
    }
}

impl From<Pinned> for HostBuffer {
    fn from(pinned: Pinned) -> Self {
        HostBuffer(Memory::Pinned(pinned))
    }
}

impl fmt::Debug for HostBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.0 {
            Memory::Pageable(_) => "pageable",
            Memory::Pinned(_) => "page-locked",
        };
        write!(f, "HostBuffer({kind})")
    }
}
