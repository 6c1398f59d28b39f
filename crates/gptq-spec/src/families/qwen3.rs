//! Qwen3: heads as wide as `head_dim` says, whatever the hidden size, with a norm over each head's queries
//! and keys before they are rotated.

use super::family::Family;
use super::parts;
use super::sliding_window::SlidingWindow;
use crate::LlamaCpp;
use crate::keys::{Keys, flag};
use crate::shapes::Shapes;
use crate::{BlockBuilder, BlockSpec, Register};

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
    llama_cpp: Some(LlamaCpp {
        architecture: "qwen3",
        ..LlamaCpp::PLAIN
    }),
    block,
    ..Family::PLAIN
};

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let bias = flag(keys, "attention_bias")?;
    let mut block = BlockBuilder::new(config.hidden_size);
    let x = parts::norm(&mut block, config, "input_layernorm", Register::RESIDUAL);
    let qkv = parts::qkv(&mut block, config, x, bias);
    let qkv = parts::qk_norms(&mut block, config, qkv, true);
    let o = parts::attend(&mut block, config, qkv, config.attending(layer), bias);
    block.add(o, 1.0);
    parts::feed_forward(&mut block, config, false);
    Ok(block.build())
}
