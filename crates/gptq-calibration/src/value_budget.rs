//! How many values a columnar file may claim to hold. Runs, nulls and empty types take next to no
//! bytes, so that a file of a few hundred bytes can promise more values than there is memory or
//! time for.

use std::sync::atomic::{AtomicU64, Ordering};

/// Values for each byte of the file. Token ids take 10 bits and more, and text a byte; rows of which
/// ninety-nine in a hundred ids are padding reach about 70.
const PER_BYTE: u64 = 256;

/// Values that any file may hold, however small.
const ANY_FILE: u64 = 1 << 22;

/// What is left of them.
pub(crate) struct ValueBudget {
    most: u64,
    left: AtomicU64,
}

impl ValueBudget {
    /// For a file of this length in bytes, decompressed.
    pub(crate) fn of(length: u64) -> Self {
        let most = length.saturating_mul(PER_BYTE).saturating_add(ANY_FILE);
        let left = AtomicU64::new(most);
        ValueBudget { most, left }
    }

    /// Takes `values` of them; says what the limit is when there are not so many left.
    pub(crate) fn spend(&self, values: u64) -> Result<(), String> {
        let less = |left: u64| left.checked_sub(values);
        let spent = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        match spent {
            Ok(_) => Ok(()),
            Err(_) => Err(format!(
                "more values than the {} that a file of its size may hold ({PER_BYTE} for each \
                 byte, and {ANY_FILE})",
                self.most
            )),
        }
    }
}
