//! All ranks' states before and after a block, on rank 0, which tunes.

use std::borrow::Cow;

use gptq_kernels::Engine;
use gptq_ranks::Collective;

use crate::RunError;
use crate::gathered::gather;
use crate::gram::Dense;
use crate::stream::{Chunk, Span, Stream};

/// States that a block is tuned on.
pub(crate) struct TuningStates<'a, B: Engine> {
    /// The branch's, before the block.
    pub(crate) start: Cow<'a, Stream<B>>,
    /// The dense model's.
    pub(crate) dense: Cow<'a, Dense<B>>,
}

impl<'a, B: Engine> TuningStates<'a, B> {
    /// Brings all ranks' states to rank 0, in the host's memory; there are none on the others.
    pub(crate) fn gather(
        start: &'a Stream<B>,
        dense: &'a Dense<B>,
        ranks: &dyn Collective,
    ) -> Result<Option<Self>, RunError> {
        if ranks.share().size == 1 {
            let (start, dense) = (Cow::Borrowed(start), Cow::Borrowed(dense));
            return Ok(Some(TuningStates { start, dense }));
        }
        let [start, before, end] =
            [start, dense.before(0), dense.end()].map(|it| all_of(it, ranks));
        let (start, before, end) = (start?, before?, end?);
        Ok(ranks.is_root().then(|| TuningStates {
            start: Cow::Owned(start),
            dense: Cow::Owned(dense.of(before, end)),
        }))
    }
}

/// All ranks' chunks of a stream, on rank 0.
fn all_of<B: Engine>(stream: &Stream<B>, ranks: &dyn Collective) -> Result<Stream<B>, RunError> {
    let mut chunks = Vec::new();
    gather(stream, ranks, &mut |bits, shape| {
        chunks.push(Chunk::of_bits(bits, shape, stream.keep.half));
        Ok(())
    })?;
    Ok(Stream {
        span: Span {
            first: 0,
            of: chunks.len(),
        },
        chunks,
        ..stream.every(1)
    })
}
