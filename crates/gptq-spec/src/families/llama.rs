//! Llama: biases by `attention_bias` and `mlp_bias`.

use super::{Family, SlidingWindow, flag, parts};
use crate::keys::Keys;
use crate::{BlockBuilder, BlockSpec, ModelConfig};

pub(super) const FAMILY: Family = Family {
    model_type: "llama",
    defaults: &[("max_position_embeddings", 2048)],
    sliding_window: SlidingWindow::Never,
    block,
};

fn block(config: &ModelConfig, keys: &Keys<'_>, _layer: usize) -> Result<BlockSpec, String> {
    let bias = flag(keys, "attention_bias")?;
    let mut block = BlockBuilder::new(config.hidden_size);
    parts::attention(&mut block, config, bias, bias);
    parts::feed_forward(&mut block, config, flag(keys, "mlp_bias")?);
    Ok(block.build())
}
