//! Lanes of windows and parts of rows: who has which, and the order of sums.
//!
//! Chunks of windows lie in [`LANES`] consecutive lanes whatever the number of ranks; a rank has consecutive lanes. Sums
//! are taken chunk by chunk within a lane, and over lanes in a binary tree:
//!
//! ```text
//! ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))
//! ```
//!
//! The lanes of one of 1, 2, 4 or 8 ranks are a whole branch of that tree, so that adding up the ranks' sums, in a tree
//! again, is the same sum to the last bit.

use std::ops::Range;

/// Number of lanes of windows.
pub const LANES: usize = 8;

/// A rank's share of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RankShare {
    /// The rank.
    pub rank: usize,
    /// Number of ranks, a divisor of [`LANES`].
    pub size: usize,
}

impl RankShare {
    /// The share of the only rank.
    pub const ALL: RankShare = RankShare { rank: 0, size: 1 };

    /// Returns the rank's lanes.
    pub fn lanes(self) -> Range<usize> {
        let each = LANES / self.size;
        self.rank * each..(self.rank + 1) * each
    }

    /// Returns the rank's part of `n` chunks.
    pub fn chunks(self, n: usize) -> Range<usize> {
        let lanes = self.lanes();
        n * lanes.start / LANES..n * lanes.end / LANES
    }

    /// Returns the chunks of `lane`, of `n`.
    pub fn lane(lane: usize, n: usize) -> Range<usize> {
        n * lane / LANES..n * (lane + 1) / LANES
    }

    /// Returns the rank's rows of `n` that lie in strips of `strip`. Rank 0 has some if there are any.
    pub fn rows(self, n: usize, strip: usize) -> Range<usize> {
        let strips = n.div_ceil(strip);
        let at = |rank: usize| ((strips * rank).div_ceil(self.size) * strip).min(n);
        at(self.rank)..at(self.rank + 1)
    }
}

/// Adds up `parts`, of which there are a power of two, in a binary tree; those that are absent count as nothing.
pub fn tree<T>(parts: Vec<Option<T>>, add: &mut impl FnMut(T, T) -> T) -> Option<T> {
    let mut parts = parts;
    while parts.len() > 1 {
        let mut rest = parts.into_iter();
        let mut sums = Vec::new();
        while let Some(left) = rest.next() {
            sums.push(match (left, rest.next().flatten()) {
                (Some(a), Some(b)) => Some(add(a, b)),
                (one, other) => one.or(other),
            });
        }
        parts = sums;
    }
    parts.pop().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_have_whole_lanes_and_every_chunk_and_row_once() {
        for size in [1, 2, 4, 8] {
            for n in 0..40 {
                let shares = (0..size).map(|rank| RankShare { rank, size });
                let chunks: Vec<usize> = shares.clone().flat_map(|it| it.chunks(n)).collect();
                assert_eq!(chunks, (0..n).collect::<Vec<_>>());
                for share in shares.clone() {
                    let lanes = share.lanes().flat_map(|lane| RankShare::lane(lane, n));
                    assert!(lanes.eq(share.chunks(n)));
                }
                let rows: Vec<usize> = shares.flat_map(|it| it.rows(32 * n, 64)).collect();
                assert_eq!(rows, (0..32 * n).collect::<Vec<_>>());
                let first = RankShare { rank: 0, size }.rows(32 * n, 64);
                assert!(n == 0 || !first.is_empty());
                assert!(first.end.is_multiple_of(64) || first.end == 32 * n);
            }
        }
    }

    #[test]
    fn the_sums_of_ranks_add_up_to_the_sum_of_one_to_the_last_bit() {
        // Of such numbers, different orders give different sums.
        let numbers = [1e8f32, 1.0, -1e8, 1.0, 5.0, 0.0, 7.0, 0.5];
        let lane = |i: usize| Some(numbers[i]).filter(|_| i != 5);
        let add = &mut |a, b| a + b;
        let whole = tree((0..LANES).map(lane).collect(), add);
        let in_a_row = (0..LANES).filter_map(lane).sum::<f32>();
        assert_ne!(whole, Some(in_a_row), "the numbers show the order");
        for size in [1, 2, 4, 8] {
            let ranks = (0..size).map(|rank| {
                let lanes = RankShare { rank, size }.lanes();
                tree(lanes.map(lane).collect(), add)
            });
            let ranks = ranks.collect();
            assert_eq!(tree(ranks, add), whole, "{size} ranks");
        }
        assert_eq!(tree::<f32>(vec![None; 8], &mut |a, b| a + b), None);
    }
}
