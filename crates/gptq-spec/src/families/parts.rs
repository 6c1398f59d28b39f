//! Parts of a block that most families share, under Llama's names.

use crate::keys::{Keys, flag};
use crate::shapes::Shapes;
use crate::{Activation, Attending, BlockBuilder, BlockSpec, Register};

/// Llama's block.
pub(super) fn block(config: &Shapes, keys: &Keys<'_>, layer: usize) -> Result<BlockSpec, String> {
    let bias = flag(keys, "attention_bias")?;
    let mut block = BlockBuilder::new(config.hidden_size);
    attention(&mut block, config, layer, bias, bias);
    feed_forward(&mut block, config, flag(keys, "mlp_bias")?);
    Ok(block.build())
}

/// `residual += o(attention(q, k, v))` of `norm(residual)`.
pub(super) fn attention(
    block: &mut BlockBuilder,
    config: &Shapes,
    layer: usize,
    qkv_bias: bool,
    o_bias: bool,
) {
    let x = norm(block, config, "input_layernorm", Register::RESIDUAL);
    let qkv = qkv(block, config, x, qkv_bias);
    let o = attend(block, config, qkv, config.attending(layer), o_bias);
    block.add(o, 1.0);
}

/// Queries, keys and values of `x`.
pub(super) fn qkv(
    block: &mut BlockBuilder,
    config: &Shapes,
    x: Register,
    bias: bool,
) -> [Register; 3] {
    let dim = config.head_dim;
    let linears = [
        ("self_attn.q_proj", config.heads * dim, bias),
        ("self_attn.k_proj", config.kv_heads * dim, bias),
        ("self_attn.v_proj", config.kv_heads * dim, bias),
    ];
    block.linears(x, Some("self_attn.qkv_proj"), linears)
}

/// Queries and keys with a norm each, over every head's features, or over those of all.
pub(super) fn qk_norms(
    block: &mut BlockBuilder,
    config: &Shapes,
    [q, k, v]: [Register; 3],
    by_head: bool,
) -> [Register; 3] {
    let mut norm = |name, heads: usize, from| {
        let heads = if by_head { 1 } else { heads };
        block.norm(name, heads * config.head_dim, config.norm, from)
    };
    let q = norm("self_attn.q_norm", config.heads, q);
    let k = norm("self_attn.k_norm", config.kv_heads, k);
    [q, k, v]
}

/// `o(attention(q, k, v))`.
pub(super) fn attend(
    block: &mut BlockBuilder,
    config: &Shapes,
    qkv: [Register; 3],
    how: Attending,
    bias: bool,
) -> Register {
    let attended = block.attend(qkv, how);
    let o = ("self_attn.o_proj", config.hidden_size, bias);
    let [o] = block.linears(attended, None, [o]);
    o
}

/// `residual += down(silu(gate(x)) * up(x))`, `x = norm(residual)`.
pub(super) fn feed_forward(block: &mut BlockBuilder, config: &Shapes, bias: bool) {
    let x = norm(
        block,
        config,
        "post_attention_layernorm",
        Register::RESIDUAL,
    );
    let down = gated(block, config, x, Activation::Silu, bias);
    block.add(down, 1.0);
}

/// `down(act(gate(x)) * up(x))`.
pub(super) fn gated(
    block: &mut BlockBuilder,
    config: &Shapes,
    x: Register,
    act: Activation,
    bias: bool,
) -> Register {
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let (gate, up) = (("mlp.gate_proj", wide, bias), ("mlp.up_proj", wide, bias));
    let [gate, up] = block.linears(x, Some("mlp.gate_up_proj"), [gate, up]);
    let gated = block.gate(act, gate, up);
    let [down] = block.linears(gated, None, [("mlp.down_proj", hidden, bias)]);
    down
}

/// `down(silu(gate(x)) * up(x))` of the expert `path`, of `width`, to which every token goes.
pub(super) fn shared_expert(
    block: &mut BlockBuilder,
    config: &Shapes,
    x: Register,
    path: &str,
    width: usize,
) -> Register {
    let [gate, up, both, down] =
        ["gate_proj", "up_proj", "gate_up_proj", "down_proj"].map(|name| format!("{path}.{name}"));
    let linears = [(&*gate, width, false), (&*up, width, false)];
    let [gate, up] = block.linears(x, Some(&both), linears);
    let gated = block.gate(Activation::Silu, gate, up);
    let [down] = block.linears(gated, None, [(&*down, config.hidden_size, false)]);
    down
}

/// The same where gate and up are one linear, rows of the gate first.
pub(super) fn gated_fused(block: &mut BlockBuilder, config: &Shapes, x: Register) -> Register {
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let [both] = block.linears(x, None, [("mlp.gate_up_proj", 2 * wide, false)]);
    let [gate, up] = block.split(both, [wide, wide]);
    let gated = block.gate(Activation::Silu, gate, up);
    let [down] = block.linears(gated, None, [("mlp.down_proj", hidden, false)]);
    down
}

/// A norm over the hidden states' features.
pub(super) fn norm(
    block: &mut BlockBuilder,
    config: &Shapes,
    name: &str,
    from: Register,
) -> Register {
    block.norm(name, config.hidden_size, config.norm, from)
}
