//! Mistral: Llama's block without biases, over a sliding window.

use super::family::Family;
use super::parts;
use super::sliding_window::SlidingWindow;
use crate::LlamaCpp;
use crate::keys::Keys;
use crate::shapes::Shapes;
use crate::{BlockBuilder, BlockSpec};

pub(super) const FAMILY: Family = Family {
    model_type: "mistral",
    defaults: &[
        ("max_position_embeddings", 131_072),
        ("num_key_value_heads", 8),
        ("sliding_window", 4096),
    ],
    sliding_window: SlidingWindow::Always,
    llama_cpp: Some(LlamaCpp {
        architecture: "llama",
        paired: true,
        ..LlamaCpp::PLAIN
    }),
    block,
    ..Family::PLAIN
};

fn block(config: &Shapes, _keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let mut block = BlockBuilder::new(config.hidden_size);
    parts::attention(&mut block, config, layer, false, false);
    parts::feed_forward(&mut block, config, false);
    Ok(block.build())
}
