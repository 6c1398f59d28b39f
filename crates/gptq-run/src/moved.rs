//! Change of a block's output when some of its linear layers are quantized.

use burn::tensor::{DType, Tensor};
use gptq_format::FormatError;
use gptq_kernels::{Engine, map_lanes};
use gptq_model::Block;
use gptq_ranks::Collective;

use crate::RunError;
use crate::profile::{Clock, Phase};
use crate::stream::Stream;

/// Stride: every `SHARE`-th chunk is measured.
const SHARE: usize = 4;
/// Replaces a value that is not finite: a state a thousand times its original length.
pub(crate) const LOST: f64 = 1e6;

/// Returns the mean over tokens of `‖ŷ - y‖² / ‖y‖²`, `y` the residual stream at the end of
/// `block` and `ŷ` that with the weights of `quantized`, which differ from tap `from` on.
///
/// The ratio is taken per token because the next norm removes each token's length, and single
/// tokens can be longer than all others together.
pub(crate) fn moved<B: Engine>(
    stream: &Stream<B>,
    block: &Block<B>,
    quantized: &Block<B>,
    from: usize,
    (ranks, device): (&dyn Collective, &B::Device),
    clock: &mut Clock,
) -> Result<f64, RunError> {
    let chunks = (stream.span.first..).zip(&stream.chunks);
    let chunks = chunks.filter(|(at, _)| at.is_multiple_of(SHARE));
    let chunks: Vec<_> = chunks.map(|(_, chunk)| chunk).collect();
    let moved = clock.measure::<B, _>(Phase::Forward, device, || {
        map_lanes::<B, _, _>(chunks, |chunk| {
            let flow = chunk.flow(device)?;
            let end = |block: &Block<B>| {
                let end = block.advance(from..block.spec().taps().end, flow.clone());
                end.residual.cast(DType::F32)
            };
            let (dense, own) = (end(block), end(quantized));
            let tokens = dense.dims()[0];
            let lengths = squares(dense.clone()).add_scalar(f32::MIN_POSITIVE);
            let sum = (squares(own - dense) / lengths).sum().into_data();
            let sum = sum.as_slice::<f32>().expect("the tensor was cast to f32")[0];
            Ok((f64::from(sum), tokens))
        })
    });
    let moved = moved
        .into_iter()
        .collect::<Result<Vec<(f64, usize)>, FormatError>>()?;
    // One by one in their order, so that the sum does not depend on who has which.
    let own = moved
        .iter()
        .flat_map(|(sum, tokens)| [*sum, *tokens as f64]);
    let own = own.flat_map(f64::to_le_bytes).collect();
    let all = ranks.all_gather(own)?.concat();
    let numbers = all
        .chunks_exact(8)
        .map(|it| f64::from_le_bytes(it.try_into().expect("eight bytes")));
    let numbers: Vec<f64> = numbers.collect();
    let (sum, tokens) =
        (numbers.chunks_exact(2)).fold((0.0, 0.0), |(sum, n), it| (sum + it[0], n + it[1]));
    let mean = sum / tokens;
    Ok(if mean.is_finite() { mean } else { LOST })
}
/// Returns each row's squared length, `[rows, 1]`.
pub(crate) fn squares<B: Engine>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    (x.clone() * x).sum_dim(1)
}
