//! A run on ranks that are threads of this process.

use std::thread::scope;

use gptq_kernels::Device;
use gptq_plan::Plan;
use gptq_ranks::Threads;

use crate::{Event, Outcome, RunError, RunOptions, quantize};

/// Carries the plan out as [`quantize`] does, on as many ranks as there are `devices`, each a thread with its device.
/// The ranks share the host memory that `options` allow.
///
/// # Errors
/// Those of [`quantize`] on any rank.
pub fn quantize_on_threads(
    plan: &Plan,
    devices: &[Device],
    options: RunOptions<'_>,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, RunError> {
    let host_memory = options.host_memory.map(|all| all / devices.len() as u64);
    let options = RunOptions {
        host_memory,
        ..options
    };
    let mut ranks = Threads::ranks(devices.len())?.into_iter().zip(devices);
    let (root, &device) = ranks.next().expect("there is at least one rank");
    scope(|scope| {
        for (rank, &device) in ranks {
            // What ends it, rank 0 is told.
            scope.spawn(move || quantize(plan, device, &rank, options, &mut |_| {}).map(drop));
        }
        quantize(plan, device, &root, options, on_event)
    })
}
