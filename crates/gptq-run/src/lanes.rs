//! Sums over chunks: chunk by chunk in a lane, and over a rank's lanes in a binary tree, which goes on over the ranks
//! (`rank_sums.rs`).

use std::ops::Range;

use gptq_format::FormatError;
use gptq_kernels::Engine;
use gptq_ranks::{Collective, RankError, RankShare};

use crate::stream::{Chunk, Stream};

/// Chunks of a lane, each with its number among those of all ranks.
pub(crate) type LaneChunks<'a, B> = [(usize, &'a Chunk<B>)];

/// Returns the sum of a rank's lanes, of which `lane` gives one and `add` adds two; `None` if the rank has no chunk.
/// Up to [`Engine::LANES`] lanes run at the same time; few of their sums are alive together.
pub(crate) fn lane_sums<B: Engine, T: Send>(
    stream: &Stream<B>,
    share: RankShare,
    lane: &(impl Fn(&LaneChunks<'_, B>) -> Result<T, FormatError> + Sync),
    add: &(impl Fn(T, T) -> T + Sync),
) -> Result<Option<T>, FormatError> {
    branch(stream, share.lanes(), lane, add)
}

fn branch<B: Engine, T: Send>(
    stream: &Stream<B>,
    lanes: Range<usize>,
    lane: &(impl Fn(&LaneChunks<'_, B>) -> Result<T, FormatError> + Sync),
    add: &(impl Fn(T, T) -> T + Sync),
) -> Result<Option<T>, FormatError> {
    if lanes.len() == 1 {
        let chunks = RankShare::lane(lanes.start, stream.span.of);
        let first = stream.span.first;
        let chunks: Vec<_> = chunks.map(|at| (at, &stream.chunks[at - first])).collect();
        return match chunks.is_empty() {
            true => Ok(None),
            false => lane(&chunks).map(Some),
        };
    }
    let middle = lanes.start + lanes.len() / 2;
    let left = || branch(stream, lanes.start..middle, lane, add);
    let right = || branch(stream, middle..lanes.end, lane, add);
    let (left, right) = match lanes.len() <= B::LANES {
        true => rayon::join(left, right),
        false => (left(), right()),
    };
    Ok(match (left?, right?) {
        (Some(a), Some(b)) => Some(add(a, b)),
        (one, other) => one.or(other),
    })
}

/// Adds up a number over all ranks, on each.
pub(crate) fn count_ranks(own: usize, ranks: &dyn Collective) -> Result<usize, RankError> {
    Ok(numbers(own as u64, ranks)?.iter().sum::<u64>() as usize)
}

/// Returns the least of all ranks' numbers, on each.
pub(crate) fn least_of_ranks(own: u64, ranks: &dyn Collective) -> Result<u64, RankError> {
    Ok(numbers(own, ranks)?.into_iter().fold(own, u64::min))
}

/// All ranks' numbers, in order.
fn numbers(own: u64, ranks: &dyn Collective) -> Result<Vec<u64>, RankError> {
    if ranks.share().size == 1 {
        return Ok(vec![own]);
    }
    let all = ranks.all_gather(own.to_le_bytes().to_vec())?;
    let number = |(from, bytes): (usize, &Vec<u8>)| {
        let number = bytes.as_slice().try_into().map(u64::from_le_bytes);
        number.map_err(|_| RankError::Length {
            from,
            found: bytes.len(),
            wanted: 8,
        })
    };
    all.iter().enumerate().map(number).collect()
}
