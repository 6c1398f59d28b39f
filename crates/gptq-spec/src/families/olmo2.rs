//! OLMo 2: norms on what attention and feed-forward give, none before them, and over all queries and all keys.

use super::family::Family;
use super::parts;
use crate::LlamaCpp;
use crate::keys::{Keys, flag};
use crate::shapes::Shapes;
use crate::{Activation, BlockBuilder, BlockSpec, NormKind, Register};

pub(super) const FAMILY: Family = Family {
    model_type: "olmo2",
    defaults: &[("max_position_embeddings", 2048)],
    norm: NormKind::RmsF32,
    eps: ("rms_norm_eps", 1e-5),
    llama_cpp: Some(LlamaCpp {
        architecture: "olmo2",
        own_head: true,
        ..LlamaCpp::PLAIN
    }),
    block,
    ..Family::PLAIN
};

pub(super) fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let bias = flag(keys, "attention_bias")?;
    let mut block = BlockBuilder::new(config.hidden_size);
    let qkv = parts::qkv(&mut block, config, Register::RESIDUAL, bias);
    let qkv = parts::qk_norms(&mut block, config, qkv, false);
    let o = parts::attend(&mut block, config, qkv, config.attending(layer), bias);
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
