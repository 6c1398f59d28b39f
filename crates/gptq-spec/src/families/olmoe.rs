//! OLMoE: Llama's block with norms over all queries and all keys, and experts in place of the feed-forward.

use super::family::Family;
use super::mixture::{self, Defaults, Names};
use super::parts;
use crate::keys::{Keys, flag};
use crate::llama_cpp::LlamaCppExperts;
use crate::shapes::Shapes;
use crate::{BlockBuilder, BlockSpec, LlamaCpp, Register, Routing};

pub(super) const FAMILY: Family = Family {
    model_type: "olmoe",
    defaults: &[("max_position_embeddings", 4096)],
    eps: ("rms_norm_eps", 1e-5),
    refused: &["clip_qkv"],
    llama_cpp: Some(LlamaCpp {
        architecture: "olmoe",
        own_head: true,
        experts: Some(LlamaCppExperts {
            renormalizes: false,
            told_width: false,
            square: true,
            square_keys: true,
        }),
        ..LlamaCpp::PLAIN
    }),
    block,
    ..Family::PLAIN
};

const DEFAULTS: Defaults = Defaults {
    counts: &["num_experts", "num_local_experts"],
    experts: 64,
    top_k: 8,
};

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let bias = flag(keys, "attention_bias")?;
    let how = Routing {
        renormalize: flag(keys, "norm_topk_prob")?,
        ..mixture::routing(keys, &DEFAULTS)?
    };
    let mut block = BlockBuilder::new(config.hidden_size);
    let x = parts::norm(&mut block, config, "input_layernorm", Register::RESIDUAL);
    let qkv = parts::qkv(&mut block, config, x, bias);
    let qkv = parts::qk_norms(&mut block, config, qkv, false);
    let o = parts::attend(&mut block, config, qkv, config.attending(layer), bias);
    block.add(o, 1.0);
    let norm = "post_attention_layernorm";
    let x = parts::norm(&mut block, config, norm, Register::RESIDUAL);
    let routing = block.route(Names::PLAIN.router, false, how, x);
    let shape = [config.intermediate_size, config.hidden_size];
    mixture::add_experts(&mut block, &Names::PLAIN, x, routing, shape);
    Ok(block.build())
}
