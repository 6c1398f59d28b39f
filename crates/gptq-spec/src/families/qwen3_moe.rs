//! Qwen3 with experts: in place of the feed-forward, in all blocks but those that the config names.

use super::family::Family;
use super::mixture::{self, Defaults, Names};
use super::parts;
use crate::keys::{Keys, flag, off};
use crate::llama_cpp::LlamaCppExperts;
use crate::shapes::Shapes;
use crate::{BlockBuilder, BlockSpec, LlamaCpp, Register, Routing};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen3_moe",
    defaults: &[
        ("max_position_embeddings", 32_768),
        ("num_key_value_heads", 4),
    ],
    llama_cpp: Some(LlamaCpp {
        architecture: "qwen3moe",
        experts: Some(LlamaCppExperts {
            renormalizes: true,
            told_width: true,
            square: false,
            square_keys: false,
        }),
        ..LlamaCpp::PLAIN
    }),
    block,
    ..Family::PLAIN
};

const DEFAULTS: Defaults = Defaults {
    counts: &["num_experts", "num_local_experts"],
    experts: 128,
    top_k: 8,
};

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    off(keys, "use_sliding_window")?;
    let bias = flag(keys, "attention_bias")?;
    let mut block = BlockBuilder::new(config.hidden_size);
    let x = parts::norm(&mut block, config, "input_layernorm", Register::RESIDUAL);
    let qkv = parts::qkv(&mut block, config, x, bias);
    let qkv = parts::qk_norms(&mut block, config, qkv, true);
    let o = parts::attend(&mut block, config, qkv, config.attending(layer), bias);
    block.add(o, 1.0);
    if !mixture::is_sparse(keys, layer)? {
        parts::feed_forward(&mut block, config, false);
        return Ok(block.build());
    }
    let how = Routing {
        renormalize: flag(keys, "norm_topk_prob")?,
        ..mixture::routing(keys, &DEFAULTS)?
    };
    let width = mixture::width(keys, "moe_intermediate_size", 768)?;
    let norm = "post_attention_layernorm";
    let x = parts::norm(&mut block, config, norm, Register::RESIDUAL);
    let routing = block.route(Names::PLAIN.router, false, how, x);
    let shape = [width, config.hidden_size];
    mixture::add_experts(&mut block, &Names::PLAIN, x, routing, shape);
    Ok(block.build())
}
