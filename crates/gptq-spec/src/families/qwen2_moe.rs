//! Qwen2 with experts: in all blocks but those that the config names, beside a shared expert that has a gate.

use super::family::Family;
use super::mixture::{self, Defaults, Names};
use super::parts;
use super::sliding_window::SlidingWindow;
use crate::keys::{Keys, flag};
use crate::llama_cpp::LlamaCppExperts;
use crate::shapes::Shapes;
use crate::{BlockBuilder, BlockSpec, LlamaCpp, Register, Routing};

pub(super) const FAMILY: Family = Family {
    model_type: "qwen2_moe",
    defaults: &[
        ("max_position_embeddings", 32_768),
        ("num_key_value_heads", 16),
        ("sliding_window", 4096),
    ],
    sliding_window: SlidingWindow::Listed,
    llama_cpp: Some(LlamaCpp {
        architecture: "qwen2moe",
        own_head: true,
        experts: Some(LlamaCppExperts {
            renormalizes: false,
            told_width: true,
            square: true,
            square_keys: false,
        }),
        ..LlamaCpp::PLAIN
    }),
    block,
    ..Family::PLAIN
};

const DEFAULTS: Defaults = Defaults {
    counts: &["num_experts", "num_local_experts"],
    experts: 60,
    top_k: 4,
};

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let bias = keys.found("qkv_bias")?.unwrap_or(true);
    let mut block = BlockBuilder::new(config.hidden_size);
    parts::attention(&mut block, config, layer, bias, false);
    if !mixture::is_sparse(keys, layer)? {
        parts::feed_forward(&mut block, config, false);
        return Ok(block.build());
    }
    let how = Routing {
        renormalize: flag(keys, "norm_topk_prob")?,
        ..mixture::routing(keys, &DEFAULTS)?
    };
    let width = mixture::width(keys, "moe_intermediate_size", 1408)?;
    let shared = mixture::width(keys, "shared_expert_intermediate_size", 5632)?;
    let norm = "post_attention_layernorm";
    let x = parts::norm(&mut block, config, norm, Register::RESIDUAL);
    let down = parts::shared_expert(&mut block, config, x, "mlp.shared_expert", shared);
    let down = block.weigh(down, x, "mlp.shared_expert_gate");
    block.add(down, 1.0);
    let routing = block.route(Names::PLAIN.router, false, how, x);
    let shape = [width, config.hidden_size];
    mixture::add_experts(&mut block, &Names::PLAIN, x, routing, shape);
    Ok(block.build())
}
