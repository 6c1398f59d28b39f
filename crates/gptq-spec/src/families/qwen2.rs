//! Qwen2: Llama's block with biases on queries, keys and values.

use super::family::Family;
use super::parts;
use super::sliding_window::SlidingWindow;
use crate::LlamaCpp;
use crate::keys::Keys;
use crate::shapes::Shapes;
use crate::{BlockBuilder, BlockSpec};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2",
    defaults: &[
        ("max_position_embeddings", 32_768),
        ("num_key_value_heads", 32),
        ("sliding_window", 4096),
        ("max_window_layers", 28),
    ],
    sliding_window: SlidingWindow::Switched,
    llama_cpp: Some(LlamaCpp {
        architecture: "qwen2",
        ..LlamaCpp::PLAIN
    }),
    block,
    ..Family::PLAIN
};

fn block(config: &Shapes, _keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let mut block = BlockBuilder::new(config.hidden_size);
    parts::attention(&mut block, config, layer, true, false);
    parts::feed_forward(&mut block, config, false);
    Ok(block.build())
}
