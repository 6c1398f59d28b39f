//! EXAONE 4: OLMo 2's order of norms, with those of queries and keys by head; where some blocks are over a sliding
//! window, by default three of four, the others do not rotate.

use super::family::Family;
use super::parts;
use super::sliding_window::SlidingWindow;
use crate::keys::Keys;
use crate::shapes::Shapes;
use crate::{Activation, Attending, BlockBuilder, BlockSpec, Register};

pub(super) const FAMILY: Family = Family {
    model_type: "exaone4",
    defaults: &[
        ("max_position_embeddings", 2048),
        ("num_key_value_heads", 32),
        ("sliding_window", 4096),
    ],
    eps: ("rms_norm_eps", 1e-5),
    sliding_window: SlidingWindow::Pattern {
        key: Some("sliding_window_pattern"),
        every: 4,
        null_is_off: true,
    },
    block,
    ..Family::PLAIN
};

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let plain = config.attending(layer);
    // Transformers goes by the key, even where no block slides.
    let slides = keys.nullable::<usize>("sliding_window")? != Some(None);
    let how = Attending {
        rope: plain.rope.filter(|_| !slides || plain.window.is_some()),
        ..plain
    };
    let mut block = BlockBuilder::new(config.hidden_size);
    let qkv = parts::qkv(&mut block, config, Register::RESIDUAL, false);
    let qkv = parts::qk_norms(&mut block, config, qkv, true);
    let o = parts::attend(&mut block, config, qkv, how, false);
    let o = parts::norm(&mut block, config, "post_attention_layernorm", o);
    block.add(o, 1.0);
    let down = parts::gated(
        &mut block,
        config,
        Register::RESIDUAL,
        Activation::Silu,
        false,
    );
    let down = parts::norm(&mut block, config, "post_feedforward_layernorm", down);
    block.add(down, 1.0);
    Ok(block.build())
}
