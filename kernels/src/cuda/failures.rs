//! Errors of device work that nobody waited for, until the thread that submitted it asks.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use cubecl::stream_id::StreamId;

use super::error::Error;

/// Device and stream.
pub(crate) type StreamPlace = (usize, u64);

/// The first error of calls that nobody waited for, for each device and stream.
static FAILURES: Mutex<BTreeMap<StreamPlace, Error>> = Mutex::new(BTreeMap::new());
/// True if there may be any.
static FAILED: AtomicBool = AtomicBool::new(false);

/// Returns the first error of this thread's calls that nobody waited for: of all of them, once a later one of the
/// device has been waited for.
pub(crate) fn check(device: usize) -> Result<(), Error> {
    take_failure((device, StreamId::current().value))
}

pub(crate) fn take_failure(place: StreamPlace) -> Result<(), Error> {
    if !FAILED.load(Ordering::Acquire) {
        return Ok(());
    }
    let mut failures = FAILURES.lock().unwrap_or_else(PoisonError::into_inner);
    let found = failures.remove(&place);
    FAILED.store(!failures.is_empty(), Ordering::Release);
    found.map_or(Ok(()), Err)
}

/// Keeps an error, if it is the first of its stream.
pub(crate) fn keep(place: StreamPlace, error: Error) {
    let mut failures = FAILURES.lock().unwrap_or_else(PoisonError::into_inner);
    failures.entry(place).or_insert(error);
    FAILED.store(true, Ordering::Release);
}
