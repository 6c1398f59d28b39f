//! Asynchronous transfers of tensors to the device and back through page-locked memory.
//!
//! The driver copies from pageable memory through a small buffer of its own, on the calling thread;
//! page-locked memory is accessed by the device itself, in stream order, while the host continues.
//! Allocating such memory is slow, so blocks are returned to a pool. Each block has an event that
//! is recorded after its last transfer: the host waits for it before accessing the memory, and the
//! pool before reusing the block.

use std::{
    mem::ManuallyDrop,
    ptr::NonNull,
    slice,
    sync::{Mutex, PoisonError},
};

use burn::tensor::{DType, Tensor};
use cubecl::{cuda::CudaRuntime, prelude::*};
use cudarc::driver::{
    result as driver,
    sys::{CU_MEMHOSTALLOC_PORTABLE, CUevent, CUevent_flags, CUstream},
};

use super::{
    Cuda, Device,
    buffer::{self, Buffer},
    context::{bind, refused},
    error::{Error, fail},
    stream::on_stream,
};

/// Block sizes are multiples of this many bytes.
const GRAIN: usize = 1 << 20;
/// A free block is used for requests of at least 1 / `WASTE` of its size.
const WASTE: usize = 4;

/// Free blocks; their last transfer may still be in progress.
static POOL: Mutex<Vec<PinnedBlock>> = Mutex::new(Vec::new());

/// A page-locked allocation.
struct PinnedBlock {
    memory: NonNull<u8>,
    bytes: usize,
    device: usize,
    /// Event recorded after the last transfer from or to the block.
    event: CUevent,
}

// SAFETY: the memory is plain host memory that one owner holds; events may be used from any thread.
unsafe impl Send for PinnedBlock {}
// SAFETY: as above; a shared block is only read.
unsafe impl Sync for PinnedBlock {}

impl PinnedBlock {
    fn new(bytes: usize, device: usize) -> Result<PinnedBlock, Error> {
        // SAFETY: a context is current; the flag makes the memory page-locked for all of them.
        let memory = unsafe { driver::malloc_host(bytes, CU_MEMHOSTALLOC_PORTABLE) }
            .map_err(refused("cuMemHostAlloc"))?;
        let event = driver::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING)
            .map_err(refused("cuEventCreate"))?;
        Ok(PinnedBlock {
            memory: NonNull::new(memory.cast()).expect("an allocation that succeeded"),
            bytes,
            device,
            event,
        })
    }

    fn idle(&self) -> bool {
        // SAFETY: the event lives as long as the block.
        unsafe { driver::event::query(self.event) }.is_ok()
    }
}

/// The leading bytes of a page-locked block, until dropped.
pub(crate) struct Pinned {
    block: ManuallyDrop<PinnedBlock>,
    bytes: usize,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: taken once, here, and not used again.
        let block = unsafe { ManuallyDrop::take(&mut self.block) };
        POOL.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(block);
    }
}

impl Pinned {
    /// Returns memory of this size with undefined contents, from the pool or newly allocated.
    pub(crate) fn take(bytes: usize, device: usize) -> Result<Pinned, Error> {
        bind(device)?;
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |block: &PinnedBlock| {
            block.device == device
                && block.bytes >= bytes
                && block.bytes / WASTE <= bytes.max(GRAIN)
                && block.idle()
        };
        let found = pool.iter().position(fits).map(|at| pool.swap_remove(at));
        drop(pool);
        let block = match found {
            Some(block) => block,
            None => PinnedBlock::new(bytes.max(1).next_multiple_of(GRAIN), device)?,
        };
        Ok(Pinned {
            block: ManuallyDrop::new(block),
            bytes,
        })
    }

    /// Waits for the last transfer.
    fn settle(&self) {
        let settled = bind(self.block.device).and_then(|_| {
            // SAFETY: the event lives as long as the block.
            unsafe { driver::event::synchronize(self.block.event) }
                .map_err(refused("cuEventSynchronize"))
        });
        settled.unwrap_or_else(|error| fail(error));
    }

    fn bytes(&self) -> &[u8] {
        self.settle();
        // SAFETY: the block is at least this long, and nothing writes it now.
        unsafe { slice::from_raw_parts(self.block.memory.as_ptr(), self.bytes) }
    }

    /// Returns the contents, after the last transfer.
    pub(crate) fn values<T: CubeElement>(&self) -> &[T] {
        T::from_bytes(self.bytes())
    }

    /// Returns the contents for writing.
    pub(crate) fn bits_mut(&mut self) -> &mut [u16] {
        self.settle();
        // SAFETY: the block is at least this long and aligned to a page; this is its only owner.
        unsafe {
            slice::from_raw_parts_mut(
                self.block.memory.as_ptr().cast(),
                self.bytes / size_of::<u16>(),
            )
        }
    }

    /// Marks the end of a transfer. Runs on the device thread, after the transfer was submitted.
    fn record(&self, stream: CUstream) -> Result<(), Error> {
        // SAFETY: both live.
        unsafe { driver::event::record(self.block.event, stream) }.map_err(refused("cuEventRecord"))
    }
}

/// Uploads a tensor of `shape` and a 16-bit `dtype` from `from`, starting at value `start`.
///
/// # Panics
/// `from` ends before the tensor does.
pub(crate) fn upload<const D: usize>(
    from: &Pinned,
    start: usize,
    shape: [usize; D],
    dtype: DType,
    device: &Device,
) -> Result<Tensor<Cuda, D>, Error> {
    let out = buffer::empty_on(&CudaRuntime::client(device), device, shape, dtype);
    let size = dtype.size();
    let (start, bytes) = (start * size, shape.iter().product::<usize>() * size);
    assert!(start + bytes <= from.bytes, "upload: {shape:?} at {start}");
    on_stream(&[&out], |libraries, pointers| {
        // SAFETY: both ranges lie inside their memory, and the block is not touched by the host or
        // given away before the event recorded below.
        unsafe {
            let source = slice::from_raw_parts(from.block.memory.as_ptr().add(start), bytes);
            driver::memcpy_htod_async(pointers[0], source, libraries.stream)
        }
        .map_err(refused("cuMemcpyHtoDAsync"))?;
        from.record(libraries.stream)
    })?;
    Ok(buffer::into_float(out))
}

/// Starts the transfer of the buffer's contents to the host.
pub(crate) fn fetch(buffer: &Buffer) -> Result<Pinned, Error> {
    let bytes = buffer.meta.shape().num_elements() * buffer.dtype.size();
    let to = Pinned::take(bytes, buffer.device.index)?;
    on_stream(&[buffer], |libraries, pointers| {
        // SAFETY: as in `upload`; nobody else holds the block.
        unsafe {
            let target = slice::from_raw_parts_mut(to.block.memory.as_ptr(), bytes);
            driver::memcpy_dtoh_async(target, pointers[0], libraries.stream)
        }
        .map_err(refused("cuMemcpyDtoHAsync"))?;
        to.record(libraries.stream)
    })?;
    Ok(to)
}

/// Starts the transfer of a matrix of f16 or bf16 to the host.
pub(crate) fn download(x: Tensor<Cuda, 2>) -> Result<Pinned, Error> {
    fetch(&buffer::half("download", "x", x)?)
}
