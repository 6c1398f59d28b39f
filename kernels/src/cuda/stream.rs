//! Library calls on the very stream that Burn's kernels run on.
//!
//! CubeCL gives each host thread a CUDA stream of its own and runs every command of a device
//! on one device thread, in the order in which they were submitted. [`on_stream`] submits a
//! closure to that thread. There, the buffers' raw pointers are resolved (which also makes the
//! stream wait for buffers that were last used by another one), and cuBLAS, cuSOLVER or a
//! kernel of our own is called on the same stream. So the library's work runs after all that
//! was submitted before it and before all that comes after, with no event and no host
//! synchronisation, and a buffer freed afterwards is reused in stream order.
//!
//! CubeCL 0.10 does not hand out the stream itself. It is read from the server's `Debug`
//! output, once per stream; the version is pinned, and a test races the two sides against
//! each other.

use std::{
    cell::RefCell,
    collections::HashMap,
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
};

use cubecl::{
    config::{CubeClRuntimeConfig, RuntimeConfig},
    cuda::CudaDevice,
    device::Device as _,
    device_handle::DeviceHandle,
    prelude::*,
    server::{Binding, ComputeServer},
    stream_id::StreamId,
};
use cudarc::{cublas, cusolver, driver::sys::CUstream};

use super::{buffer::Buffer, error::Error, library::missing_library};

type Server = <cubecl::cuda::CudaRuntime as Runtime>::Server;

/// The library handles bound to one stream.
pub(crate) struct Libraries {
    /// The stream that Burn's kernels of the calling thread run on.
    pub(crate) stream: CUstream,
    /// A cuBLAS handle on that stream.
    pub(crate) cublas: cublas::sys::cublasHandle_t,
    /// A cuSOLVER handle on that stream.
    pub(crate) cusolver: cusolver::sys::cusolverDnHandle_t,
    /// The device's ordinal.
    pub(crate) device: usize,
}

thread_local! {
    /// One set of handles per device and stream; lives on the device thread, to its end.
    static LIBRARIES: RefCell<HashMap<(usize, usize), Rc<Libraries>>> = RefCell::default();
}

/// Runs `call` on the device's thread with the buffers' device pointers, ordered on the
/// calling thread's stream, and returns what it returns.
///
/// `call` must enqueue its work on [`Libraries::stream`]. All buffers are on the device of the
/// first, and there is at least one.
pub(crate) fn on_stream<T: Send>(
    buffers: &[&Buffer],
    call: impl FnOnce(&Libraries, &[u64]) -> Result<T, Error> + Send,
) -> Result<T, Error> {
    let target = Target::new(buffers);
    DeviceHandle::<Server>::new(target.device.to_id())
        .submit_blocking(move |server| target.run(server, call))
        .map_err(|error| Error::runtime(&format!("{error:?}")))?
}

/// The first error of the calls that were submitted without waiting for them.
#[derive(Clone, Default)]
pub(crate) struct Failures(Arc<Mutex<Option<Error>>>);

impl Failures {
    /// The error, if there is one by now. Complete once the device thread has been waited for,
    /// by [`on_stream`] or by reading a buffer back.
    pub(crate) fn check(&self) -> Result<(), Error> {
        match self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }
}

/// As [`on_stream`], in the same order, without waiting for the device thread: a round trip
/// to it takes longer than a small product. An error goes to `failures`.
pub(crate) fn on_stream_later(
    buffers: &[&Buffer],
    failures: &Failures,
    call: impl FnOnce(&Libraries, &[u64]) -> Result<(), Error> + Send + 'static,
) {
    let target = Target::new(buffers);
    let failures = failures.clone();
    DeviceHandle::<Server>::new(target.device.to_id()).submit(move |server| {
        if let Err(error) = target.run(server, call) {
            let mut first = failures.0.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(error);
        }
    });
}

/// The buffers of a call and the stream that it belongs to.
struct Target {
    device: CudaDevice,
    stream: StreamId,
    bindings: Vec<Binding>,
}

impl Target {
    fn new(buffers: &[&Buffer]) -> Self {
        Self {
            device: buffers[0].device.clone(),
            stream: StreamId::current(),
            bindings: buffers
                .iter()
                .map(|buffer| buffer.handle.clone().binding())
                .collect(),
        }
    }

    /// Runs on the device thread.
    fn run<T>(
        self,
        server: &mut Server,
        call: impl FnOnce(&Libraries, &[u64]) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut resources = Vec::with_capacity(self.bindings.len());
        for binding in self.bindings {
            let resource = server
                .get_resource(binding, self.stream)
                .map_err(|error| Error::runtime(&error.to_string()))?;
            resources.push(resource);
        }
        let pointers: Vec<u64> = resources.iter().map(|it| it.resource().ptr).collect();
        let libraries = libraries(server, self.device.index, self.stream)?;
        call(&libraries, &pointers)
    }
}

/// The handles for a stream, made at first use. Runs on the device thread.
fn libraries(server: &Server, device: usize, stream: StreamId) -> Result<Rc<Libraries>, Error> {
    let max_streams = usize::from(CubeClRuntimeConfig::get().streaming.max_streams);
    let index = usize::try_from(stream.value).unwrap_or(usize::MAX) % max_streams;
    if let Some(found) = LIBRARIES.with_borrow(|all| all.get(&(device, index)).cloned()) {
        return Ok(found);
    }
    if let Some(missing) = missing_library() {
        return Err(missing.into());
    }
    let stream = stream_at(&format!("{server:?}"), index).ok_or(Error::Stream)? as CUstream;
    let cublas = cublas::result::create_handle().map_err(|source| Error::Cublas {
        operation: "cublasCreate",
        source,
    })?;
    let cusolver = cusolver::result::dn_create().map_err(|source| Error::Cusolver {
        operation: "cusolverDnCreate",
        source,
    })?;
    // SAFETY: both handles were just made, and CubeCL never destroys a stream.
    unsafe {
        cublas::result::set_stream(cublas, stream.cast()).map_err(|source| Error::Cublas {
            operation: "cublasSetStream",
            source,
        })?;
        cusolver::result::dn_set_stream(cusolver, stream.cast()).map_err(|source| {
            Error::Cusolver {
                operation: "cusolverDnSetStream",
                source,
            }
        })?;
    }
    let made = Rc::new(Libraries {
        stream,
        cublas,
        cusolver,
        device,
    });
    LIBRARIES.with_borrow_mut(|all| all.insert((device, index), made.clone()));
    Ok(made)
}

/// The address of the stream in slot `index` of the server's stream pool, from its `Debug`
/// output: `StreamPool { streams: [None, Some(StreamWrapper { stream: Stream { sys: 0x.., ..`.
fn stream_at(debug: &str, index: usize) -> Option<usize> {
    let pool = &debug[debug.find("StreamPool {")?..];
    let list = &pool[pool.find("streams: [")? + "streams: [".len()..];
    let slot = slots(list).nth(index)?;
    let at = slot.find("sys: 0x")? + "sys: 0x".len();
    let digits: String = slot[at..]
        .chars()
        .take_while(char::is_ascii_hexdigit)
        .collect();
    usize::from_str_radix(&digits, 16)
        .ok()
        .filter(|&address| address != 0)
}

/// Splits a `Debug` list, given from after its opening bracket, at its top-level commas.
fn slots(list: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(list);
    std::iter::from_fn(move || {
        let text = rest?;
        let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
        for (at, byte) in text.bytes().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if quoted => escaped = true,
                b'"' => quoted = !quoted,
                _ if quoted => {}
                b'(' | b'[' | b'{' => depth += 1,
                b')' | b']' | b'}' if depth > 0 => depth -= 1,
                b',' if depth == 0 => {
                    rest = Some(&text[at + 1..]);
                    return Some(&text[..at]);
                }
                b']' => {
                    rest = None;
                    return Some(&text[..at]);
                }
                _ => {}
            }
        }
        rest = None;
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: &str = "CudaServer { ctx: X { streams: [1] }, streams: MultiStream { streams: \
        StreamPool { streams: [None, Some(StreamWrapper { stream: Stream { sys: 0x7f10, \
        memory: [a, b], errors: [\"], \\\" 0x1\"] }, cursor: 1 }), None, Some(StreamWrapper { \
        stream: Stream { sys: 0xabc } })], factory: F } }, comm_stream: 0x2 }";

    #[test]
    fn the_stream_is_found_in_its_slot_and_only_there() {
        assert_eq!(stream_at(POOL, 0), None);
        assert_eq!(stream_at(POOL, 1), Some(0x7f10));
        assert_eq!(stream_at(POOL, 2), None);
        assert_eq!(stream_at(POOL, 3), Some(0xabc));
        assert_eq!(stream_at(POOL, 4), None);
        assert_eq!(stream_at("CudaServer", 0), None);
    }
}
