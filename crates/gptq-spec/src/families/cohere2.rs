//! Cohere 2: attention and feed-forward side by side from one LayerNorm; only blocks over a sliding window, three of
//! four, rotate, and neighbouring features together.

use super::family::{Ends, Family, Rotary};
use super::parts;
use super::sliding_window::SlidingWindow;
use crate::keys::{Keys, flag, number};
use crate::shapes::Shapes;
use crate::{Activation, Attending, BlockBuilder, BlockSpec, NormKind, Register};

pub(super) const FAMILY: Family = Family {
    model_type: "cohere2",
    defaults: &[("max_position_embeddings", 8192), ("sliding_window", 4096)],
    norm: NormKind::Layer,
    eps: ("layer_norm_eps", 1e-5),
    tied: true,
    rotary: Rotary {
        interleaved: true,
        ..Rotary::PLAIN
    },
    sliding_window: SlidingWindow::Pattern {
        key: Some("sliding_window_pattern"),
        every: 4,
        null_is_off: false,
    },
    ends,
    block,
    ..Family::PLAIN
};

fn ends(_config: &Shapes, keys: &Keys<'_>) -> Result<Ends, String> {
    Ok(Ends {
        logits: number(keys, "logit_scale", 0.0625)?,
        ..Ends::PLAIN
    })
}

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let bias = flag(keys, "attention_bias")?;
    let plain = config.attending(layer);
    let how = Attending {
        rope: plain.rope.filter(|_| plain.window.is_some()),
        ..plain
    };
    let mut block = BlockBuilder::new(config.hidden_size);
    let x = parts::norm(&mut block, config, "input_layernorm", Register::RESIDUAL);
    let qkv = parts::qkv(&mut block, config, x, bias);
    let o = parts::attend(&mut block, config, qkv, how, bias);
    block.add(o, 1.0);
    let down = parts::gated(&mut block, config, x, Activation::Silu, false);
    block.add(down, 1.0);
    Ok(block.build())
}
