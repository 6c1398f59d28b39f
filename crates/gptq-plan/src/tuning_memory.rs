//! Memory for tuning a block, from shapes alone.

use gptq_spec::BlockSpec;

use crate::Plan;

/// Returns the bytes for tuning the largest block, with activations of `half` bytes.
pub(crate) fn tuned(plan: &Plan, half: u128) -> u128 {
    /// Queries whose scores are computed at once: their matrices are in f32 and in 16 bits, and so are their
    /// gradients.
    const QUERIES: u128 = 256;
    /// Bytes of these matrices up to which a device takes windows together.
    const TOGETHER: u128 = 256 << 20;
    /// Logits that are computed at once.
    const LOGITS: u128 = 1 << 26;
    let (tokens, seq_len) = (plan.tokens() as u128, plan.calibration.seq_len as u128);
    let step = tokens.min(plan.step_windows() as u128 * seq_len);
    let hidden = plan.config.hidden_size as u128;
    let block = |block: &BlockSpec| {
        let taps = block.taps().map(|tap| block.in_features(tap) as u128);
        let grams: u128 = taps.map(|n| n * n * 4).sum();
        let heads = block.attention().map_or(0, |attention| attention.heads) as u128;
        let scores = 12 * heads * QUERIES.min(seq_len) * seq_len;
        let together = (step / seq_len.max(1) * scores).min(TOGETHER);
        // Unrounded codes, where they began, two moments and the gradient in f32; weights tuned and solved, codes.
        block.weights() * (5 * 4 + 2 * half + 1)
            + grams
            + step * (2 * block.features() as u128 + 6 * hidden) * half
            + step * hidden * 3 * 4
            + scores.max(together)
            + tokens * hidden * 2
    };
    let blocks = plan.config.blocks().iter();
    let block = blocks.map(|it| block(it)).max().unwrap_or_default();
    // The last block's goes through the head: its table, and both models' logits and their gradient.
    let vocabulary = plan.config.vocabulary as u128;
    let logits = (step * vocabulary).min(LOGITS.max(vocabulary));
    block + vocabulary * hidden * half + logits * (3 * 4 + 2 * half)
}
