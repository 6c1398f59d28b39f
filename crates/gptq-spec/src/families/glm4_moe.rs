//! GLM-4.5 and its successors: experts of sigmoid scores, chosen by scores with a correction, beside shared experts;
//! the first blocks are dense, and half a head is rotated.

use super::family::{Family, Rotary};
use super::mixture::{self, Defaults, Names};
use super::parts;
use crate::keys::{Keys, flag, number};
use crate::shapes::Shapes;
use crate::{BlockBuilder, BlockSpec, Register, Routing, Scoring};

pub(super) const FAMILY: Family = Family {
    model_type: "glm4_moe",
    defaults: &[
        ("max_position_embeddings", 131_072),
        ("num_key_value_heads", 8),
    ],
    eps: ("rms_norm_eps", 1e-5),
    rotary: Rotary {
        partial: Some(0.5),
        ..Rotary::PLAIN
    },
    further: Some("num_nextn_predict_layers"),
    block,
    ..Family::PLAIN
};

const DEFAULTS: Defaults = Defaults {
    counts: &["n_routed_experts", "num_local_experts", "num_experts"],
    experts: 128,
    top_k: 8,
};

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let bias = flag(keys, "attention_bias")?;
    let mut block = BlockBuilder::new(config.hidden_size);
    let x = parts::norm(&mut block, config, "input_layernorm", Register::RESIDUAL);
    let mut qkv = parts::qkv(&mut block, config, x, bias);
    if flag(keys, "use_qk_norm")? {
        qkv = parts::qk_norms(&mut block, config, qkv, true);
    }
    let o = parts::attend(&mut block, config, qkv, config.attending(layer), false);
    block.add(o, 1.0);
    if layer < keys.found("first_k_dense_replace")?.unwrap_or(1) {
        parts::feed_forward(&mut block, config, false);
        return Ok(block.build());
    }
    if let Some(groups) = keys.found::<usize>("n_group")?.filter(|&it| it != 1) {
        let name = keys.name("n_group");
        return Err(format!("{name} = {groups} is not supported, only 1"));
    }
    let how = Routing {
        scoring: Scoring::Sigmoid,
        renormalize: keys.found("norm_topk_prob")?.unwrap_or(true),
        scale: number(keys, "routed_scaling_factor", 1.0)?,
        ..mixture::routing(keys, &DEFAULTS)?
    };
    let width = mixture::width(keys, "moe_intermediate_size", 1408)?;
    let shared = width * mixture::width(keys, "n_shared_experts", 1)?;
    let norm = "post_attention_layernorm";
    let x = parts::norm(&mut block, config, norm, Register::RESIDUAL);
    let down = parts::shared_expert(&mut block, config, x, "mlp.shared_experts", shared);
    block.add(down, 1.0);
    let routing = block.route(Names::PLAIN.router, true, how, x);
    let shape = [width, config.hidden_size];
    mixture::add_experts(&mut block, &Names::PLAIN, x, routing, shape);
    Ok(block.build())
}
