//! Options for running a plan, and stopping it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::RunError;

/// Options of a run; none of them changes a byte of a branch.
#[derive(Clone, Copy, Debug)]
pub struct RunOptions<'a> {
    /// Wait for the device after each piece of work, so that the profile tells them apart.
    pub profile: bool,
    /// Device memory to keep within, in bytes; without it, what is free.
    pub device_memory: Option<u64>,
    /// Host memory to keep within, in bytes; without it, none is counted.
    pub host_memory: Option<u64>,
    /// Directory for hidden states that do not fit in memory; without it, the output directory.
    pub scratch: Option<&'a Path>,
    /// Age of the last saved hidden states at which they are saved to disk again. A run that is stopped loses
    /// no more work than that.
    pub save_every: Duration,
    /// Make everything again, whatever is there.
    pub restart: bool,
    /// Once it is true, the run ends as soon as it can be gone on with.
    pub stop: &'a AtomicBool,
}

/// Returns an error once `stop` is true.
pub(crate) fn check_stop(stop: &AtomicBool, layers: usize) -> Result<(), RunError> {
    match stop.load(Ordering::Relaxed) {
        false => Ok(()),
        true => Err(RunError::Stopped { done: 0, layers }),
    }
}
