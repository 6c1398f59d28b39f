//! Reads blocks ahead while the previous one is processed.

use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use gptq_kernels::Engine;
use gptq_model::{HostBlock, Model, ModelError};

use crate::sources;

/// A block with the digest of its tensors in the model's files ([`sources::block`]).
pub(crate) type Ahead = Result<(HostBlock, String), ModelError>;

/// Reads blocks from `first` on, on a separate thread, one ahead of the run.
pub(crate) fn read_ahead<'scope, 'env, B: Engine>(
    scope: &'scope Scope<'scope, 'env>,
    model: &'env Model<B>,
    first: usize,
) -> Receiver<Ahead> {
    let (sender, receiver) = sync_channel(0);
    scope.spawn(move || {
        for layer in first..model.config().layers {
            // Before reading the block, which drops the pages of its files.
            let source = sources::block(model.checkpoint(), model.config(), layer);
            let block = model.read_block(layer);
            let ahead = source.map_err(ModelError::from);
            let ahead = ahead.and_then(|source| Ok((block?, source)));
            // A run that has ended receives no more.
            if sender.send(ahead).is_err() {
                break;
            }
        }
    });
    receiver
}
