//! Gemma 2: norms by `1 + w` before and after attention and feed-forward, a GELU gate, bounded scores and logits,
//! and every other block over a sliding window.

use super::family::{Ends, Family};
use super::parts;
use super::sliding_window::SlidingWindow;
use crate::LlamaCpp;
use crate::keys::{Keys, flag, number, off, or_none};
use crate::llama_cpp::SlidingBlocks;
use crate::shapes::Shapes;
use crate::{Activation, Attending, BlockBuilder, BlockSpec, NormKind, Register};

pub(super) const FAMILY: Family = Family {
    model_type: "gemma2",
    defaults: &[
        ("max_position_embeddings", 8192),
        ("num_key_value_heads", 4),
        ("head_dim", 256),
        ("sliding_window", 4096),
    ],
    norm: NormKind::RmsPlusOne,
    activation: ("hidden_activation", &["gelu_pytorch_tanh"]),
    tied: true,
    sliding_window: SlidingWindow::Pattern {
        key: None,
        every: 2,
        null_is_off: false,
    },
    llama_cpp: Some(LlamaCpp {
        architecture: "gemma2",
        windows: SlidingBlocks::AllBut(2),
        embedding_root: true,
        wide_scores_at: Some(46),
        ..LlamaCpp::PLAIN
    }),
    ends: |config, keys| ends(config, keys, Some(30.0)),
    block: |config, keys, layer| block(config, keys, layer, Some(50.0), false),
    ..Family::PLAIN
};

pub(super) fn ends(config: &Shapes, keys: &Keys<'_>, softcap: Option<f64>) -> Result<Ends, String> {
    Ok(Ends {
        embedding: (config.hidden_size as f64).sqrt(),
        logits: 1.0,
        softcap: or_none(keys, "final_logit_softcapping", softcap)?,
    })
}

/// `softcap`: of scores, where the key is left out. `normed`: queries and keys are.
pub(super) fn block(
    config: &Shapes,
    keys: &Keys<'_>,
    layer: usize,
    softcap: Option<f64>,
    normed: bool,
) -> Result<BlockSpec, String> {
    off(keys, "use_bidirectional_attention")?;
    let bias = flag(keys, "attention_bias")?;
    let how = Attending {
        scale: Some(number(keys, "query_pre_attn_scalar", 256.0)?.powf(-0.5)),
        softcap: or_none(keys, "attn_logit_softcapping", softcap)?,
        ..config.attending(layer)
    };
    let mut block = BlockBuilder::new(config.hidden_size);
    let x = parts::norm(&mut block, config, "input_layernorm", Register::RESIDUAL);
    let mut qkv = parts::qkv(&mut block, config, x, bias);
    if normed {
        qkv = parts::qk_norms(&mut block, config, qkv, true);
    }
    let o = parts::attend(&mut block, config, qkv, how, bias);
    let o = parts::norm(&mut block, config, "post_attention_layernorm", o);
    block.add(o, 1.0);
    let x = parts::norm(
        &mut block,
        config,
        "pre_feedforward_layernorm",
        Register::RESIDUAL,
    );
    let down = parts::gated(&mut block, config, x, Activation::GeluTanh, false);
    let down = parts::norm(&mut block, config, "post_feedforward_layernorm", down);
    block.add(down, 1.0);
    Ok(block.build())
}
