//! Library calls on the stream of Burn's kernels.
//!
//! CubeCL gives each host thread its own CUDA stream and runs every command of a device on one
//! device thread, in submission order. [`on_stream`] submits a closure to that thread. There, the
//! buffers' raw pointers are resolved (which also makes the stream wait for buffers that were last
//! used by another one), and cuBLAS, cuSOLVER or one of our kernels is called on the same stream.
//! So the library's work is ordered with all other commands of the stream, with no event and no
//! host synchronization, and a buffer freed afterwards is reused in stream order.
//!
//! Waiting for that thread takes 10 to 200 µs, more than most kernels. So what has no result for the host is
//! submitted by [`on_stream_later`], whose errors come up at the thread's next call; whoever brings results to
//! the host waits by [`on_stream`] or ends with [`settle`].
//!
//! CubeCL 0.10 does not expose the stream: neither its server nor what the server returns has an
//! accessor. Its address is parsed from the server's `Debug` output, once per stream, and only if
//! that has exactly the format of version 0.10.0, which `Cargo.toml` pins. Before use the driver
//! must confirm it as a live stream of the device's context, and a test checks the ordering by a
//! race.

use std::{cell::RefCell, collections::HashMap, ptr, rc::Rc};

use cubecl::{
    config::{CubeClRuntimeConfig, RuntimeConfig},
    cuda::CudaDevice,
    device::Device as _,
    device_handle::DeviceHandle,
    prelude::*,
    server::{Binding, ComputeServer},
    stream_id::StreamId,
};
use cudarc::{
    cublas, cusolver,
    driver::{
        DriverError,
        sys::{self as driver, CUresult, CUstream},
    },
};

use super::{
    buffer::Buffer,
    context::bind,
    error::Error,
    failures::{StreamPlace, check, keep, take_failure},
    library::missing_library,
};

type Server = <cubecl::cuda::CudaRuntime as Runtime>::Server;

/// Library handles bound to one stream.
pub(crate) struct Libraries {
    /// Stream of Burn's kernels for the calling thread.
    pub(crate) stream: CUstream,
    /// A cuBLAS handle on that stream.
    pub(crate) cublas: cublas::sys::cublasHandle_t,
    /// A cuSOLVER handle on that stream.
    pub(crate) cusolver: cusolver::sys::cusolverDnHandle_t,
    /// The device's ordinal.
    pub(crate) device: usize,
}

thread_local! {
    /// One set of handles per device and stream, kept on the device thread until it ends.
    static LIBRARIES: RefCell<HashMap<(usize, usize), Rc<Libraries>>> = RefCell::default();
}

/// Runs `call` on the device's thread with the buffers' device pointers, ordered on the calling
/// thread's stream, and returns its result, or the error of an earlier [`on_stream_later`].
///
/// `call` must enqueue its work on [`Libraries::stream`]. All buffers must be on the device of the
/// first, and there must be at least one.
pub(crate) fn on_stream<T: Send>(
    buffers: &[&Buffer],
    call: impl FnOnce(&Libraries, &[u64]) -> Result<T, Error> + Send,
) -> Result<T, Error> {
    let target = StreamTarget::new(buffers);
    let place = target.place();
    let done = DeviceHandle::<Server>::new(target.device.to_id())
        .submit_blocking(move |server| target.run(server, call))
        .map_err(|_| Error::runtime("the device's thread has ended"));
    take_failure(place)?;
    done?
}

/// Runs `call` like [`on_stream`], in the same order, but without waiting for the device thread: a
/// round trip takes longer than a small product. Its error is that of the next call that this thread
/// makes, of whichever kind, or of [`settle`].
///
/// # Errors
///
/// The error of an earlier call.
pub(crate) fn on_stream_later(
    buffers: &[&Buffer],
    call: impl FnOnce(&Libraries, &[u64]) -> Result<(), Error> + Send + 'static,
) -> Result<(), Error> {
    let target = StreamTarget::new(buffers);
    let place = target.place();
    take_failure(place)?;
    DeviceHandle::<Server>::new(target.device.to_id()).submit(move |server| {
        if let Err(error) = target.run(server, call) {
            keep(place, error);
        }
    });
    Ok(())
}

/// Waits until the device thread has taken all calls of this thread.
///
/// # Errors
///
/// The error of a call that nobody waited for.
pub(crate) fn settle(device: usize) -> Result<(), Error> {
    let id = CudaDevice::new(device).to_id();
    let waited = DeviceHandle::<Server>::new(id).submit_blocking(|_| ());
    check(device)?;
    waited.map_err(|_| Error::runtime("the device's thread has ended"))
}

/// Buffers of a call, and its stream.
struct StreamTarget {
    device: CudaDevice,
    stream: StreamId,
    bindings: Vec<Binding>,
}

impl StreamTarget {
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

    fn place(&self) -> StreamPlace {
        (self.device.index, self.stream.value)
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

/// Returns the handles for a stream, made on first use. Runs on the device thread.
fn libraries(server: &Server, device: usize, stream: StreamId) -> Result<Rc<Libraries>, Error> {
    let max_streams = usize::from(CubeClRuntimeConfig::get().streaming.max_streams);
    let index = usize::try_from(stream.value).unwrap_or(usize::MAX) % max_streams;
    if let Some(found) = LIBRARIES.with_borrow(|all| all.get(&(device, index)).cloned()) {
        return Ok(found);
    }
    if let Some(missing) = missing_library() {
        return Err(missing.into());
    }
    let stream = stream_of(server, device, index)?;
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

/// Returns the stream in slot `index` of the server's pool, after the driver has confirmed it as a
/// live stream of the device.
fn stream_of(server: &Server, device: usize, index: usize) -> Result<CUstream, Error> {
    let refused = |why| Error::Stream { why };
    let stream = stream_at(&format!("{server:?}"), index).map_err(refused)? as CUstream;
    let own = bind(device)?;
    let mut context = ptr::null_mut();
    // SAFETY: the handle is not null and was parsed from the output of the pinned CubeCL version,
    // which never destroys streams; the driver fills in the context.
    let (told, state) = unsafe {
        (
            driver::cuStreamGetCtx(stream, &raw mut context),
            driver::cuStreamQuery(stream),
        )
    };
    if told != CUresult::CUDA_SUCCESS {
        return Err(refused("unknown to the driver"));
    }
    if context != own.cu_ctx() {
        return Err(refused("not in the device's context"));
    }
    match state {
        CUresult::CUDA_SUCCESS | CUresult::CUDA_ERROR_NOT_READY => Ok(stream),
        // An error of earlier work is reported as such.
        state => Err(Error::Driver {
            operation: "cuStreamQuery",
            source: DriverError(state),
        }),
    }
}

/// Text before the list of streams, which occurs once, and before a stream's address.
const POOL: &str = "streams: MultiStream { streams: StreamPool { streams: [";
const STREAM: &str = "Some(StreamWrapper { stream: Stream { sys: 0x";

/// Parses the address of the stream in slot `index` of the server's stream pool from its `Debug`
/// output: `StreamPool { streams: [None, Some(StreamWrapper { stream: Stream { sys: 0x.., ..`.
fn stream_at(debug: &str, index: usize) -> Result<usize, &'static str> {
    let mut pools = debug.split(POOL).skip(1);
    let (Some(list), None) = (pools.next(), pools.next()) else {
        return Err("the runtime does not show one pool of streams");
    };
    let slot = slots(list).nth(index).ok_or("the pool has fewer streams")?;
    let rest = slot.trim_start().strip_prefix(STREAM);
    let rest = rest.ok_or("the pool does not show it")?;
    let end = rest.find(|c: char| !c.is_ascii_hexdigit());
    let (digits, rest) = rest.split_at(end.unwrap_or(rest.len()));
    let address = usize::from_str_radix(digits, 16);
    match address {
        // A stream is an object in memory; 0, 1 and 2 are predefined stream handles.
        Ok(address) if address > 2 && address % align_of::<u64>() == 0 => {}
        _ => return Err("the pool shows an invalid address"),
    }
    if !rest.starts_with([',', ' ']) {
        return Err("the pool shows an invalid address");
    }
    address.map_err(|_| "the pool shows an invalid address")
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

    const SERVER: &str = "CudaServer { ctx: X { streams: [1] }, streams: MultiStream { streams: \
        StreamPool { streams: [None, Some(StreamWrapper { stream: Stream { sys: 0x7f10, \
        memory: [a, b], errors: [\"], \\\" 0x1\"] }, cursor: 1 }), None, Some(StreamWrapper { \
        stream: Stream { sys: 0xabc8 } })], factory: F } }, comm_stream: 0x2 }";

    #[test]
    fn the_stream_is_found_in_its_slot_and_only_there() {
        assert_eq!(stream_at(SERVER, 1), Ok(0x7f10));
        assert_eq!(stream_at(SERVER, 3), Ok(0xabc8));
        for (index, why) in [(0, "not show it"), (2, "not show it"), (4, "fewer streams")] {
            let found = stream_at(SERVER, index).unwrap_err();
            assert!(found.contains(why), "{index}: {found}");
        }
    }

    #[test]
    fn text_that_reads_in_any_other_way_gives_no_address() {
        for (from, to) in [
            ("0x7f10", "0x0"),
            ("0x7f10", "0x"),
            ("0x7f10", "0x2"),
            ("0x7f10", "0x7f11"),
            ("0x7f10", "0x7f10zz"),
            ("0x7f10", "32528"),
            ("0x7f10", "0x11112222333344445"),
            ("Stream { sys: 0x7f10", "Stream { id: 7, sys: 0x7f10"),
            ("StreamWrapper", "StreamHandle"),
            ("StreamPool", "Pool"),
            (
                "ctx: X",
                "ctx: streams: MultiStream { streams: StreamPool { streams: [] } }",
            ),
        ] {
            let text = SERVER.replacen(from, to, 1);
            assert_ne!(text, SERVER);
            assert!(
                stream_at(&text, 1).is_err(),
                "{to}: {:?}",
                stream_at(&text, 1)
            );
        }
        assert!(stream_at("CudaServer", 0).is_err());
        assert!(stream_at("", 0).is_err());
    }
}
