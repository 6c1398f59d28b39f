//! Blocks read while the one before is worked on.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use gptq_kernels::Engine;
use gptq_model::{HostBlock, Model, ModelError};

/// Reads blocks from `first` on, on a thread of their own, one ahead of the run.
pub(crate) fn read_ahead<'scope, 'env, B: Engine>(
    scope: &'scope Scope<'scope, 'env>,
    model: &'env Model<B>,
    first: usize,
) -> Receiver<Result<HostBlock, ModelError>> {
    let (sender, receiver) = sync_channel(0);
    scope.spawn(move || {
        for layer in first..model.config().layers {
            // A run that has ended takes no more.
            if sender.send(model.read_block(layer)).is_err() {
                break;
            }
        }
    });
    receiver
}
