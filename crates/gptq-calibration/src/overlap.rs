//! Overlap of an evaluation text with the calibration text.
//!
//! Two texts overlap where they share a run of [`RUN`] consecutive tokens: longer than any phrase
//! that medical or legal text repeats by habit, and shorter than a paragraph. Runs are compared by
//! a rolling hash, `h = Σ t_i B^(RUN-1-i) mod 2^64`.

use std::collections::HashSet;

use crate::CalibrationError;
use crate::token_file::TokenFile;

/// Length of the shortest run that counts, in tokens.
pub const RUN: usize = 32;

/// Odd, so that no token's contribution is lost modulo 2^64.
const BASE: u64 = 0x9e37_79b9_7f4a_7c15;

/// Result of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// Tokens of the evaluation text that are in a shared run.
    pub shared: usize,
    /// Tokens of the evaluation text.
    pub total: usize,
}

/// Compares every run of `evaluation` with every run of `calibration`.
pub(crate) fn overlap(
    calibration: &TokenFile,
    evaluation: &[u32],
) -> Result<Overlap, CalibrationError> {
    let mut hashes = Vec::new();
    Rolling::new(|hash| hashes.push(hash)).extend(evaluation);
    let wanted: HashSet<u64> = hashes.iter().copied().collect();
    let mut found = HashSet::new();
    let mut rolling = Rolling::new(|hash| {
        if wanted.contains(&hash) {
            found.insert(hash);
        }
    });
    for piece in calibration.pieces() {
        rolling.extend(&piece?);
    }
    let (mut shared, mut end) = (0, 0);
    for (start, hash) in hashes.iter().enumerate() {
        if found.contains(hash) {
            shared += start + RUN - end.max(start);
            end = start + RUN;
        }
    }
    Ok(Overlap {
        shared,
        total: evaluation.len(),
    })
}

/// Passes the hash of every full run to `each`.
struct Rolling<F> {
    each: F,
    /// The last `RUN` tokens, at their position modulo `RUN`.
    last: [u32; RUN],
    seen: usize,
    hash: u64,
    /// `BASE^RUN`.
    leaving: u64,
}

impl<F: FnMut(u64)> Rolling<F> {
    fn new(each: F) -> Self {
        Rolling {
            each,
            last: [0; RUN],
            seen: 0,
            hash: 0,
            leaving: BASE.wrapping_pow(RUN as u32),
        }
    }

    fn extend(&mut self, tokens: &[u32]) {
        for &token in tokens {
            let Some(slot) = self.last.get_mut(self.seen % RUN) else {
                return;
            };
            // Tokens count from 1, so that runs of token 0 of different lengths differ.
            let oldest = match self.seen < RUN {
                true => 0,
                false => u64::from(*slot) + 1,
            };
            *slot = token;
            let entered = self
                .hash
                .wrapping_mul(BASE)
                .wrapping_add(u64::from(token) + 1);
            self.hash = entered.wrapping_sub(oldest.wrapping_mul(self.leaving));
            self.seen += 1;
            if self.seen >= RUN {
                (self.each)(self.hash);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::token_file::TokenWriter;

    fn shared(calibration: &[u32], evaluation: &[u32]) -> usize {
        let mut writer = TokenWriter::new().unwrap();
        writer.push(calibration).unwrap();
        let overlap = overlap(&writer.finish().unwrap(), evaluation).unwrap();
        assert_eq!(overlap.total, evaluation.len());
        overlap.shared
    }

    #[test]
    fn a_shared_run_is_counted_and_a_shorter_one_is_not() {
        let calibration: Vec<u32> = (0..1000).collect();
        let with = |run: std::ops::Range<u32>| -> Vec<u32> {
            (5000..5100).chain(run).chain(6000..6100).collect()
        };
        assert_eq!(shared(&calibration, &with(200..260)), 60);
        assert_eq!(shared(&calibration, &with(200..232)), 32);
        assert_eq!(shared(&calibration, &with(200..231)), 0);
        assert_eq!(shared(&calibration, &calibration), 1000);
        assert_eq!(shared(&calibration, &[1, 2, 3]), 0);
        // Two runs with a gap between them.
        let two: Vec<u32> = (0..40).chain(5000..5003).chain(100..140).collect();
        assert_eq!(shared(&calibration, &two), 80);
    }
}
