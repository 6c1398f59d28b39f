//! Mixtral: Mistral's block with experts in place of the feed-forward, their weights renormalised.

use super::family::{Family, Rotary};
use super::mixture::{self, Defaults, Names};
use super::parts;
use super::sliding_window::SlidingWindow;
use crate::keys::Keys;
use crate::llama_cpp::LlamaCppExperts;
use crate::shapes::Shapes;
use crate::{BlockBuilder, BlockSpec, LlamaCpp, Register, Routing};

pub(super) const FAMILY: Family = Family {
    model_type: "mixtral",
    defaults: &[
        ("max_position_embeddings", 131_072),
        ("num_key_value_heads", 8),
    ],
    eps: ("rms_norm_eps", 1e-5),
    rotary: Rotary {
        theta: 1e6,
        ..Rotary::PLAIN
    },
    sliding_window: SlidingWindow::Always,
    llama_cpp: Some(LlamaCpp {
        architecture: "llama",
        paired: true,
        experts: Some(LlamaCppExperts {
            renormalizes: true,
            told_width: false,
            square: false,
            square_keys: false,
        }),
        ..LlamaCpp::PLAIN
    }),
    block,
    ..Family::PLAIN
};

const NAMES: Names = Names {
    router: "block_sparse_moe.gate",
    experts: "block_sparse_moe.experts",
    linears: ["w1", "w3", "w2"],
};

const DEFAULTS: Defaults = Defaults {
    counts: &["num_local_experts", "num_experts"],
    experts: 8,
    top_k: 2,
};

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let how = Routing {
        renormalize: true,
        ..mixture::routing(keys, &DEFAULTS)?
    };
    let mut block = BlockBuilder::new(config.hidden_size);
    parts::attention(&mut block, config, layer, false, false);
    let norm = "post_attention_layernorm";
    let x = parts::norm(&mut block, config, norm, Register::RESIDUAL);
    let routing = block.route(NAMES.router, false, how, x);
    let shape = [config.intermediate_size, config.hidden_size];
    mixture::add_experts(&mut block, &NAMES, x, routing, shape);
    Ok(block.build())
}
