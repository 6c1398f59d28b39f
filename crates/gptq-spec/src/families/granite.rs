//! Granite: Llama's block with factors of the embedding, of what is added to the residual stream, of the scores,
//! and a divisor of the logits.

use super::family::{Ends, Family};
use super::parts;
use crate::LlamaCpp;
use crate::keys::{Keys, flag, number};
use crate::shapes::Shapes;
use crate::{Activation, Attending, BlockBuilder, BlockSpec, Register};

pub(super) const FAMILY: Family = Family {
    model_type: "granite",
    defaults: &[("max_position_embeddings", 2048)],
    llama_cpp: Some(LlamaCpp {
        architecture: "granite",
        paired: true,
        factors: true,
        ..LlamaCpp::PLAIN
    }),
    ends,
    block,
    ..Family::PLAIN
};

fn ends(_config: &Shapes, keys: &Keys<'_>) -> Result<Ends, String> {
    Ok(Ends {
        embedding: number(keys, "embedding_multiplier", 1.0)?,
        logits: 1.0 / number(keys, "logits_scaling", 1.0)?,
        softcap: None,
    })
}

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let bias = flag(keys, "attention_bias")?;
    let residual = number(keys, "residual_multiplier", 1.0)?;
    let how = Attending {
        scale: Some(number(keys, "attention_multiplier", 1.0)?),
        ..config.attending(layer)
    };
    let mut block = BlockBuilder::new(config.hidden_size);
    let x = parts::norm(&mut block, config, "input_layernorm", Register::RESIDUAL);
    let qkv = parts::qkv(&mut block, config, x, bias);
    let o = parts::attend(&mut block, config, qkv, how, bias);
    block.add(o, residual);
    let x = parts::norm(
        &mut block,
        config,
        "post_attention_layernorm",
        Register::RESIDUAL,
    );
    let bias = flag(keys, "mlp_bias")?;
    let down = parts::gated(&mut block, config, x, Activation::Silu, bias);
    block.add(down, residual);
    Ok(block.build())
}
