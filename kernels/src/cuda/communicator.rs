//! Matrices between CUDA devices, by NCCL's sends and receives on the stream of Burn's kernels.
//!
//! Nothing here waits for another rank without an end: the communicator does not block, and calls that are in
//! progress are asked for their state until they are done or [`DeviceLink::abort`] has been called. What the device itself
//! waits for ends with the communicator.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{panicking, sleep};
use std::time::{Duration, Instant};

use burn::tensor::Tensor;
use cubecl::{cuda::CudaRuntime, prelude::*};

use super::{
    Cuda, Device,
    buffer::{self, Buffer},
    context::bind,
    error::fail,
    nccl::{BYTES, Comm, CommConfig, IN_PROGRESS, Nccl, SUCCESS, UniqueId},
    stream::on_stream,
};
use crate::link::{DeviceLink, LinkError, Parcel, ParcelKind, Shipment};

/// Time between looks at a call in progress.
const LOOK: Duration = Duration::from_micros(20);
/// Time within which all ranks are to join a communicator.
const JOIN: Duration = Duration::from_secs(60);
/// Time that a communicator has to end.
const END: Duration = Duration::from_secs(5);

/// Returns the number that [`connect`] is to be given on every rank of a new communicator.
///
/// # Errors
/// A missing library, or its failure.
pub(crate) fn ticket() -> Result<Vec<u8>, LinkError> {
    let nccl = library()?;
    let mut id = UniqueId([0; 128]);
    // SAFETY: the library fills the number in.
    let result = unsafe { (nccl.get_unique_id)(&raw mut id) };
    match result {
        SUCCESS => Ok(id.0.to_vec()),
        _ => Err(LinkError::Failed(nccl.describe(
            "ncclGetUniqueId",
            result,
            std::ptr::null_mut(),
        ))),
    }
}

fn library() -> Result<&'static Nccl, LinkError> {
    Nccl::get().map_err(|missing| LinkError::Failed(missing.to_string()))
}

/// Connects a device with those of the other ranks; `ended` is asked while they are awaited.
///
/// # Errors
/// A missing library, ranks that do not come within a minute, a device that two ranks have, or `ended`.
pub(crate) fn connect(
    device: &Device,
    ticket: &[u8],
    [rank, size]: [usize; 2],
    ended: &dyn Fn() -> bool,
) -> Result<Communicator, LinkError> {
    let nccl = library()?;
    let id: [u8; 128] = ticket
        .try_into()
        .map_err(|_| LinkError::Failed(format!("an NCCL identifier of {} bytes", ticket.len())))?;
    let _context = bind(device.index).map_err(|error| LinkError::Failed(error.to_string()))?;
    let mut comm: Comm = std::ptr::null_mut();
    let mut config = CommConfig::new();
    // SAFETY: the library fills the communicator in, and has read the settings when it returns; the device's context is
    // current.
    let result = unsafe {
        (nccl.comm_init_rank_config)(
            &raw mut comm,
            size as c_int,
            UniqueId(id),
            rank as c_int,
            &raw mut config,
        )
    };
    let made = Communicator {
        nccl,
        comm: Mutex::new(comm as usize),
        ended: AtomicBool::new(false),
        device: device.clone(),
    };
    let started = Instant::now();
    made.settled("ncclCommInitRank", result, &|| match ended() {
        true => Some(LinkError::Ended),
        false if started.elapsed() > JOIN => Some(LinkError::Failed(format!(
            "NCCL: the other ranks' devices did not answer within {} s",
            JOIN.as_secs()
        ))),
        false => None,
    })?;
    Ok(made)
}

/// A device's side of a communicator.
pub(crate) struct Communicator {
    nccl: &'static Nccl,
    /// Address of the communicator; 0 once it has ended.
    comm: Mutex<usize>,
    ended: AtomicBool,
    device: Device,
}

impl Communicator {
    fn comm(&self) -> MutexGuard<'_, usize> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a call that gave `result` is done, or `give_up` says why not to.
    fn settled(
        &self,
        operation: &str,
        result: c_int,
        give_up: &dyn Fn() -> Option<LinkError>,
    ) -> Result<(), LinkError> {
        let mut state = result;
        loop {
            match state {
                SUCCESS => return Ok(()),
                IN_PROGRESS => {}
                failed => {
                    let comm = *self.comm() as Comm;
                    return Err(match self.ended.load(Ordering::Acquire) {
                        true => LinkError::Ended,
                        false => LinkError::Failed(self.nccl.describe(operation, failed, comm)),
                    });
                }
            }
            if let Some(error) = give_up() {
                self.abort();
                return Err(error);
            }
            if self.ended.load(Ordering::Acquire) {
                return Err(LinkError::Ended);
            }
            sleep(LOOK);
            let comm = self.comm();
            if *comm == 0 {
                return Err(LinkError::Ended);
            }
            // SAFETY: the communicator lives as long as its address is there, and the lock keeps it.
            let asked = unsafe { (self.nccl.comm_get_async_error)(*comm as Comm, &raw mut state) };
            if asked != SUCCESS {
                state = asked;
            }
        }
    }

    /// Enqueues sends and receives on a stream.
    fn enqueue(
        &self,
        (sends, receives): (&[Move], &[Move]),
        stream: *mut c_void,
    ) -> Result<(), LinkError> {
        let result = {
            let comm = self.comm();
            if *comm == 0 {
                return Err(LinkError::Ended);
            }
            let (nccl, comm) = (self.nccl, *comm as Comm);
            // SAFETY: the communicator lives while the lock is held, and the pointers are device memory of these sizes,
            // which the stream keeps until it has come past these calls.
            unsafe {
                let mut results = vec![(nccl.group_start)()];
                for it in sends.iter().filter(|it| it.bytes > 0) {
                    let from = it.pointer as *const c_void;
                    results.push((nccl.send)(from, it.bytes, BYTES, it.rank, comm, stream));
                }
                for it in receives.iter().filter(|it| it.bytes > 0) {
                    let into = it.pointer as *mut c_void;
                    results.push((nccl.recv)(into, it.bytes, BYTES, it.rank, comm, stream));
                }
                results.push((nccl.group_end)());
                let wrong = results
                    .iter()
                    .find(|it| ![SUCCESS, IN_PROGRESS].contains(it));
                wrong.copied().unwrap_or(results[results.len() - 1])
            }
        };
        self.settled("ncclGroupEnd", result, &|| None)
    }
}

/// One matrix on its way, to or from a rank.
#[derive(Clone, Copy)]
struct Move {
    rank: c_int,
    pointer: u64,
    bytes: usize,
}

impl DeviceLink<Cuda> for Communicator {
    fn exchange(
        &self,
        sent: Shipment<Parcel<Cuda>>,
        expected: &[(usize, ParcelKind)],
    ) -> Result<Vec<Parcel<Cuda>>, LinkError> {
        let own = sent.into_iter().map(|(to, parcel)| {
            let kind = parcel.kind();
            let buffer = match parcel {
                Parcel::Float(tensor) => buffer::float("exchange", "parcel", tensor, kind.dtype),
                Parcel::Int(tensor) => buffer::int("exchange", "parcel", tensor, kind.dtype),
            };
            (to, kind, buffer.unwrap_or_else(|error| fail(error)))
        });
        let own: Vec<(usize, ParcelKind, Buffer)> = own.collect();
        let client = CudaRuntime::client(&self.device);
        let others = expected.iter().map(|&(from, kind)| {
            let buffer = buffer::empty_on(&client, &self.device, kind.shape, kind.dtype);
            (from, kind, buffer)
        });
        let others: Vec<(usize, ParcelKind, Buffer)> = others.collect();
        let all: Vec<&Buffer> = own.iter().chain(&others).map(|it| &it.2).collect();
        let moves = own.iter().chain(&others).map(|(rank, kind, _)| Move {
            rank: *rank as c_int,
            pointer: 0,
            bytes: kind.bytes(),
        });
        let (mut moves, sends) = (moves.collect::<Vec<_>>(), own.len());
        if !all.is_empty() {
            let done = on_stream(&all, move |libraries, pointers| {
                bind(libraries.device)?;
                for (it, &pointer) in moves.iter_mut().zip(pointers) {
                    it.pointer = pointer;
                }
                Ok(self.enqueue(moves.split_at(sends), libraries.stream.cast()))
            });
            done.unwrap_or_else(|error| fail(error))?;
        }
        let parcels = others
            .into_iter()
            .map(|(_, kind, buffer)| match kind.dtype.is_float() {
                true => Parcel::Float(buffer::into_float(buffer)),
                false => Parcel::Int(Tensor::from_primitive(buffer)),
            });
        Ok(parcels.collect())
    }

    fn abort(&self) {
        self.ended.store(true, Ordering::Release);
        let mut comm = self.comm();
        if *comm != 0 && bind(self.device.index).is_ok() {
            // SAFETY: the address is taken away below, so that nobody uses it again.
            let _ = unsafe { (self.nccl.comm_abort)(*comm as Comm) };
        }
        *comm = 0;
    }
}

impl Drop for Communicator {
    /// Ends the communicator together with the other ranks, which are at their ends too, or without them.
    fn drop(&mut self) {
        let comm = *self.comm();
        if comm == 0 || bind(self.device.index).is_err() {
            return;
        }
        if panicking() {
            return self.abort();
        }
        let started = Instant::now();
        // SAFETY: nobody else has the communicator any more.
        let result = unsafe { (self.nccl.comm_finalize)(comm as Comm) };
        let late = || (started.elapsed() > END).then_some(LinkError::Ended);
        if self.settled("ncclCommFinalize", result, &late).is_ok() {
            // SAFETY: as above; it was finalized.
            let _ = unsafe { (self.nccl.comm_destroy)(comm as Comm) };
        } else {
            self.abort();
        }
    }
}
