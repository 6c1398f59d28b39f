//! GLM-4: norms before and after attention and feed-forward, gate and up in one linear, and neighbouring features
//! rotated together in the first half of a head.

use super::family::{Family, Rotary};
use super::parts;
use crate::keys::Keys;
use crate::shapes::Shapes;
use crate::{BlockBuilder, BlockSpec, Register};

pub(super) const FAMILY: Family = Family {
    model_type: "glm4",
    defaults: &[
        ("max_position_embeddings", 131_072),
        ("num_key_value_heads", 2),
        ("head_dim", 128),
    ],
    eps: ("rms_norm_eps", 1.5625e-7),
    rotary: Rotary {
        partial: Some(0.5),
        interleaved: true,
        ..Rotary::PLAIN
    },
    block,
    ..Family::PLAIN
};

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let bias = keys.found("attention_bias")?.unwrap_or(true);
    let mut block = BlockBuilder::new(config.hidden_size);
    let x = parts::norm(&mut block, config, "input_layernorm", Register::RESIDUAL);
    let qkv = parts::qkv(&mut block, config, x, bias);
    let o = parts::attend(&mut block, config, qkv, config.attending(layer), false);
    let o = parts::norm(&mut block, config, "post_self_attn_layernorm", o);
    block.add(o, 1.0);
    let x = parts::norm(
        &mut block,
        config,
        "post_attention_layernorm",
        Register::RESIDUAL,
    );
    let down = parts::gated_fused(&mut block, config, x);
    let down = parts::norm(&mut block, config, "post_mlp_layernorm", down);
    block.add(down, 1.0);
    Ok(block.build())
}
