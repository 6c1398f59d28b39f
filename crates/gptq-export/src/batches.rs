//! Batches of tensors that are encoded at the same time: as many as memory is meant for.

/// Most weights of quantized linear layers in a batch; each takes some five bytes on the way.
const MAX_WEIGHTS: usize = 96 << 20;

/// Splits `items` into consecutive batches of at most so many weights, or of one item.
pub(crate) fn batches<T>(items: &[T], weights: impl Fn(&T) -> usize) -> Vec<&[T]> {
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
    use super::*;

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
