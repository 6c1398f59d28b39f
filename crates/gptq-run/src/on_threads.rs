//! A run on ranks that are threads of this process.

use std::thread::scope;

use gptq_kernels::Device;
use gptq_plan::Plan;
use gptq_ranks::Threads;

use crate::peers::MatrixPath;
use crate::quantize::quantize_by;
use crate::{Event, Outcome, RunError, RunOptions};

/// Carries the plan out as [`quantize`](crate::quantize()) does, on as many ranks as there are `devices`, each a thread with
/// its device. The ranks share the host memory that `options` allow. If all have one CUDA device, matrices go between
/// them by way of the host.
///
/// # Errors
/// Those of [`quantize`](crate::quantize()) on any rank.
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
    // NCCL knows no two ranks of one device.
    let one_card = devices.len() > 1 && devices.iter().all(|it| *it == devices[0]);
    let path = match one_card && devices[0] != Device::Cpu {
        true => MatrixPath::Host,
        false => MatrixPath::Devices,
    };
    on_threads(path, plan, devices, options, on_event)
}

fn on_threads(
    path: MatrixPath,
    plan: &Plan,
    devices: &[Device],
    options: RunOptions<'_>,
    on_event: &mut dyn FnMut(Event<'_>),
) -> Result<Outcome, RunError> {
    let mut ranks = Threads::ranks(devices.len())?.into_iter().zip(devices);
    let (root, &device) = ranks.next().expect("there is at least one rank");
    scope(|scope| {
        for (rank, &device) in ranks {
            // What ends it, rank 0 is told.
            scope.spawn(move || {
                quantize_by(path, plan, device, &rank, options, &mut |_| {}).map(drop)
            });
        }
        quantize_by(path, plan, device, &root, options, on_event)
    })
}

#[cfg(test)]
mod tests;
