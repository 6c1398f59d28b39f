//! SmolLM3: Llama's block, of which some, by default every fourth, do not rotate.

use super::family::{Family, Rotary};
use super::parts;
use super::sliding_window::{SlidingWindow, every_so_many};
use crate::LlamaCpp;
use crate::keys::{Keys, flag};
use crate::shapes::Shapes;
use crate::{Attending, BlockBuilder, BlockSpec, Register};

pub(super) const FAMILY: Family = Family {
    model_type: "smollm3",
    defaults: &[
        ("max_position_embeddings", 32_768),
        ("num_key_value_heads", 4),
    ],
    tied: true,
    rotary: Rotary {
        theta: 2e6,
        ..Rotary::PLAIN
    },
    sliding_window: SlidingWindow::Listed,
    llama_cpp: Some(LlamaCpp {
        architecture: "smollm3",
        paired: true,
        unrotated: Some(4),
        ..LlamaCpp::PLAIN
    }),
    block,
    ..Family::PLAIN
};

fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let bias = flag(keys, "attention_bias")?;
    let (rotates, plain) = (rotates(keys, layer)?, config.attending(layer));
    let how = Attending {
        rope: plain.rope.filter(|_| rotates),
        ..plain
    };
    let mut block = BlockBuilder::new(config.hidden_size);
    let x = parts::norm(&mut block, config, "input_layernorm", Register::RESIDUAL);
    let qkv = parts::qkv(&mut block, config, x, bias);
    let o = parts::attend(&mut block, config, qkv, how, bias);
    block.add(o, 1.0);
    parts::feed_forward(&mut block, config, flag(keys, "mlp_bias")?);
    Ok(block.build())
}

/// Returns true if block `layer` rotates queries and keys: its entry in `no_rope_layers` is not 0.
fn rotates(keys: &Keys<'_>, layer: usize) -> Result<bool, String> {
    let key = "no_rope_layers";
    match keys.nullable::<Vec<usize>>(key)?.flatten() {
        Some(list) => match list.get(layer) {
            Some(&rotates) => Ok(rotates != 0),
            None => Err(format!("{} has {} entries", keys.name(key), list.len())),
        },
        None => {
            let every = every_so_many(keys, "no_rope_layer_interval")?.unwrap_or(4);
            Ok(!(layer + 1).is_multiple_of(every))
        }
    }
}
