//! Phi-3 and Phi-4: Llama's block with queries, keys and values in one linear, and gate and up in another; the
//! first features of a head are rotated.

use super::family::{Family, Rotary};
use super::parts;
use super::sliding_window::SlidingWindow;
use crate::LlamaCpp;
use crate::keys::Keys;
use crate::shapes::Shapes;
use crate::{BlockBuilder, BlockSpec, Register};

pub(super) const FAMILY: Family = Family {
    model_type: "phi3",
    defaults: &[
        ("max_position_embeddings", 4096),
        ("original_max_position_embeddings", 4096),
    ],
    eps: ("rms_norm_eps", 1e-5),
    rotary: Rotary {
        partial: Some(1.0),
        kinds: &["default", "longrope"],
        renamed: &[("su", "longrope"), ("yarn", "longrope")],
        ..Rotary::PLAIN
    },
    sliding_window: SlidingWindow::Always,
    refused: &["layer_types"],
    llama_cpp: Some(LlamaCpp {
        // It reads the key of Phi-3's window, and computes none.
        architecture: "phi3",
        ..LlamaCpp::PLAIN
    }),
    block,
    ..Family::PLAIN
};

fn block(config: &Shapes, _keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let (dim, heads, kv_heads) = (config.head_dim, config.heads, config.kv_heads);
    let mut block = BlockBuilder::new(config.hidden_size);
    let x = parts::norm(&mut block, config, "input_layernorm", Register::RESIDUAL);
    let widths = [heads, kv_heads, kv_heads].map(|heads| heads * dim);
    let linear = ("self_attn.qkv_proj", widths.iter().sum(), false);
    let [all] = block.linears(x, None, [linear]);
    let qkv = block.split(all, widths);
    let o = parts::attend(&mut block, config, qkv, config.attending(layer), false);
    block.add(o, 1.0);
    let x = parts::norm(
        &mut block,
        config,
        "post_attention_layernorm",
        Register::RESIDUAL,
    );
    let down = parts::gated_fused(&mut block, config, x);
    block.add(down, 1.0);
    Ok(block.build())
}
