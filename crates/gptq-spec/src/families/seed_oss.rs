//! Seed-OSS: Llama's block with wide heads, and biases on queries, keys and values but by a key of its own on what
//! attention gives.

use super::family::Family;
use super::parts;
use crate::keys::{Keys, flag};
use crate::shapes::Shapes;
use crate::{BlockBuilder, BlockSpec};

pub(super) const FAMILY: Family = Family {
    model_type: "seed_oss",
    defaults: &[
        ("max_position_embeddings", 524_288),
        ("num_key_value_heads", 8),
        ("head_dim", 128),
    ],
    block,
    ..Family::PLAIN
};

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let bias = keys.found("attention_bias")?.unwrap_or(true);
    let o_bias = flag(keys, "attention_out_bias")?;
    let mut block = BlockBuilder::new(config.hidden_size);
    parts::attention(&mut block, config, layer, bias, o_bias);
    parts::feed_forward(&mut block, config, flag(keys, "mlp_bias")?);
    Ok(block.build())
}
