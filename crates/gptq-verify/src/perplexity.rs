//! Perplexity: `exp` of the mean negative log-likelihood of every token of every window but the
//! window's first.

use gptq_kernels::{Engine, map_lanes};
use gptq_model::Model;

use crate::VerifyError;

/// Tokens run through a block together.
const CHUNK: usize = 4096;
/// Rows of logits alive together.
const LOGIT_ROWS: usize = 512;

/// Perplexity of `model` on `windows`, all of one length of at least 2. One block is resident at a
/// time; the hidden states of all windows are.
pub(crate) fn perplexity<B: Engine>(
    model: &Model<B>,
    windows: &[Vec<u32>],
) -> Result<f64, VerifyError> {
    let window = windows[0].len();
    let per_chunk = (CHUNK / window).max(1);
    let mut flows = model.embed(windows, per_chunk, B::COMPUTE)?;
    for layer in 0..model.config().layers {
        let block = model.block(layer)?;
        flows = map_lanes::<B, _, _>(flows, |flow| block.forward(flow));
    }
    let head = model.head()?;
    let (mut total, mut count) = (0.0, 0usize);
    for (flow, chunk) in flows.into_iter().zip(windows.chunks(per_chunk)) {
        let hidden = model.config().hidden_size;
        for (i, tokens) in chunk.iter().enumerate() {
            // Position p predicts token p + 1.
            for start in (0..window - 1).step_by(LOGIT_ROWS) {
                let end = (start + LOGIT_ROWS).min(window - 1);
                let rows = i * window + start..i * window + end;
                let states = flow.residual.clone().slice([rows, 0..hidden]);
                let losses = head.negative_log_likelihoods(states, &tokens[start + 1..end + 1]);
                total += losses.iter().map(|&l| f64::from(l)).sum::<f64>();
                count += losses.len();
            }
        }
    }
    let perplexity = (total / count as f64).exp();
    match perplexity.is_finite() {
        true => Ok(perplexity),
        false => Err(VerifyError::NonFiniteOutput {
            dir: model.checkpoint().dir().into(),
        }),
    }
}
