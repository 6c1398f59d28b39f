//! Batches of tensors that are encoded and written at the same time: as many as memory is meant for.

use std::sync::mpsc::channel;
use std::thread::scope;

use gptq_format::FormatError;
use rayon::prelude::*;

use crate::ExportError;

/// Most weights of quantized linear layers in a batch; each takes some five bytes on the way.
const MAX_WEIGHTS: usize = 96 << 20;

/// Carries out `work` for every item, on all threads, batch by batch, while `sync` brings what was written to the disk.
/// `on_progress` receives the finished share.
pub(crate) fn carry_out<T: Sync>(
    items: &[T],
    weights: impl Fn(&T) -> usize,
    work: impl Fn(&T) -> Result<(), ExportError> + Sync,
    sync: impl Fn() -> Result<(), FormatError> + Sync,
    on_progress: &mut dyn FnMut(f64),
) -> Result<(), ExportError> {
    scope(|scope| {
        let (written, batches_written) = channel();
        let synced = scope.spawn(|| batches_written.into_iter().try_for_each(|()| sync()));
        let mut done = 0;
        let worked = batches(items, weights).into_iter().try_for_each(|some| {
            some.par_iter().try_for_each(&work)?;
            // Where syncing has failed, nobody listens, and its error is told below.
            let _ = written.send(());
            done += some.len();
            on_progress(done as f64 / items.len() as f64);
            Ok(())
        });
        drop(written);
        let synced = synced.join().expect("syncing cannot panic");
        worked.and(synced.map_err(ExportError::from))
    })
}

/// Splits `items` into consecutive batches of at most so many weights, or of one item.
fn batches<T>(items: &[T], weights: impl Fn(&T) -> usize) -> Vec<&[T]> {
    let (mut batches, mut start, mut held) = (Vec::new(), 0, 0usize);
    for (at, item) in items.iter().enumerate() {
        let more = weights(item);
        if at > start && held.saturating_add(more) > MAX_WEIGHTS {
            batches.push(&items[start..at]);
            (start, held) = (at, 0);
        }
        held = held.saturating_add(more);
    }
    batches.push(&items[start..]);
    batches
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_item_is_worked_on_and_an_error_of_either_ends_it() {
        let items: Vec<usize> = (0..5).collect();
        let run = |fails: Option<usize>, unsynced: bool| {
            let sum = AtomicUsize::new(0);
            let work = |item: &usize| {
                sum.fetch_add(*item, Ordering::Relaxed);
                let dir = std::path::PathBuf::new();
                match fails == Some(*item) {
                    true => Err(ExportError::Dense { dir }),
                    false => Ok(()),
                }
            };
            let missing = || FormatError::NotAFile { path: "x".into() };
            let sync = || if unsynced { Err(missing()) } else { Ok(()) };
            let mut shares = Vec::new();
            let done = carry_out(&items, |_| MAX_WEIGHTS, work, sync, &mut |share| {
                shares.push(share)
            });
            (done, sum.into_inner(), shares)
        };
        let (done, sum, shares) = run(None, false);
        assert!(done.is_ok());
        assert_eq!((sum, shares), (10, vec![0.2, 0.4, 0.6, 0.8, 1.0]));
        let (done, sum, _) = run(Some(1), false);
        assert!(matches!(done, Err(ExportError::Dense { .. })));
        assert_eq!(sum, 1);
        assert!(matches!(run(None, true).0, Err(ExportError::Format(_))));
    }

    #[test]
    fn batches_hold_every_item_once_and_few_weights() {
        let items = [MAX_WEIGHTS, 1, MAX_WEIGHTS - 1, 2, usize::MAX, 0, 0];
        let found = batches(&items, |item| *item);
        assert_eq!(found.concat(), items);
        let sizes: Vec<usize> = found.iter().map(|batch| batch.len()).collect();
        assert_eq!(sizes, [1, 2, 1, 1, 2]);
        assert_eq!(batches(&[], |item: &usize| *item), [&[] as &[usize]]);
    }
}
