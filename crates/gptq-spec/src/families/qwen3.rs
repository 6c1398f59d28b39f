//! Qwen3: heads as wide as `head_dim` says, whatever the hidden size, with a norm over each head's queries
//! and keys before they are rotated.

use super::{Family, SlidingWindow, flag, parts};
use crate::keys::Keys;
use crate::{BlockBuilder, BlockSpec, ModelConfig};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3",
    defaults: &[
        ("max_position_embeddings", 32_768),
        ("num_key_value_heads", 32),
        ("head_dim", 128),
        ("sliding_window", 4096),
        ("max_window_layers", 28),
    ],
    sliding_window: SlidingWindow::Switched,
    block,
};

fn block(config: &ModelConfig, keys: &Keys<'_>, _layer: usize) -> Result<BlockSpec, String> {
    let (dim, eps) = (config.head_dim, config.rms_norm_eps);
    let bias = flag(keys, "attention_bias")?;
    let mut block = BlockBuilder::new(config.hidden_size);
    let x = parts::norm(&mut block, config, "input_layernorm");
    let [q, k, v] = parts::qkv(&mut block, config, x, bias);
    let q = block.norm("self_attn.q_norm", dim, eps, q);
    let k = block.norm("self_attn.k_norm", dim, eps, k);
    parts::attend(&mut block, config, [q, k, v], bias);
    parts::feed_forward(&mut block, config, false);
    Ok(block.build())
}
