//! Limit on the number of values in a columnar file. Runs, nulls and empty types take almost no
//! bytes, so a file of a few hundred bytes could declare more values than memory or time allow.

use std::sync::atomic::{AtomicU64, Ordering};

/// Values per byte of the file. Token ids take 10 bits and more, and text a byte; rows of which 99
/// % are padding reach about 70.
const PER_BYTE: u64 = 256;

/// Values that any file may hold, however small.
const ANY_FILE: u64 = 1 << 22;

/// Remaining budget.
pub(crate) struct ValueBudget {
    most: u64,
    left: AtomicU64,
}

impl ValueBudget {
    /// Budget for a file of this length in bytes, decompressed.
    pub(crate) fn of(length: u64) -> Self {
        let most = length.saturating_mul(PER_BYTE).saturating_add(ANY_FILE);
        let left = AtomicU64::new(most);
        ValueBudget { most, left }
    }

    /// Spends `values`; the error states the limit.
    pub(crate) fn spend(&self, values: u64) -> Result<(), String> {
        let less = |left: u64| left.checked_sub(values);
        let spent = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        match spent {
            Ok(_) => Ok(()),
            Err(_) => Err(format!(
                "more values than the {} allowed for a file of its size ({PER_BYTE} for each \
                 byte, and {ANY_FILE})",
                self.most
            )),
        }
    }
}
