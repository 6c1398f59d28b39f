//! Llama: biases by `attention_bias` and `mlp_bias`.

use super::{Family, flag, parts};
use crate::keys::Keys;
use crate::{BlockBuilder, BlockSpec, ModelConfig};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    defaults: &[("max_position_embeddings", 2048)],
    ..Family::PLAIN
};

pub(super) fn block(
    config: &ModelConfig,
    keys: &Keys<'_>,
    layer: usize,
) -> Result<BlockSpec, String> {
    let bias = flag(keys, "attention_bias")?;
    let mut block = BlockBuilder::new(config.hidden_size);
    parts::attention(&mut block, config, layer, bias, bias);
    parts::feed_forward(&mut block, config, flag(keys, "mlp_bias")?);
    Ok(block.build())
}
