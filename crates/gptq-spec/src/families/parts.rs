//! Parts of a block that most families share, under Llama's names.

use crate::{BlockBuilder, ModelConfig, Register};

/// `residual += o(attention(q, k, v))` of `norm(residual)`.
pub(super) fn attention(
    block: &mut BlockBuilder,
    config: &ModelConfig,
    qkv_bias: bool,
    o_bias: bool,
) {
    let x = norm(block, config, "input_layernorm");
    let qkv = qkv(block, config, x, qkv_bias);
    attend(block, config, qkv, o_bias);
}

/// Queries, keys and values of `x`.
pub(super) fn qkv(
    block: &mut BlockBuilder,
    config: &ModelConfig,
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

/// `residual += o(attention(q, k, v))`.
pub(super) fn attend(
    block: &mut BlockBuilder,
    config: &ModelConfig,
    qkv: [Register; 3],
    bias: bool,
) {
    let attended = block.attend(qkv, config.head_dim, config.rope());
    let o = ("self_attn.o_proj", config.hidden_size, bias);
    let [o] = block.linears(attended, None, [o]);
    block.add(o);
}

/// `residual += down(silu(gate(x)) * up(x))`, `x = norm(residual)`.
pub(super) fn feed_forward(block: &mut BlockBuilder, config: &ModelConfig, bias: bool) {
    let (hidden, wide) = (config.hidden_size, config.intermediate_size);
    let x = norm(block, config, "post_attention_layernorm");
    let (gate, up) = (("mlp.gate_proj", wide, bias), ("mlp.up_proj", wide, bias));
    let [gate, up] = block.linears(x, Some("mlp.gate_up_proj"), [gate, up]);
    let gated = block.gate(gate, up);
    let [down] = block.linears(gated, None, [("mlp.down_proj", hidden, bias)]);
    block.add(down);
}

/// A norm of the residual stream.
pub(super) fn norm(block: &mut BlockBuilder, config: &ModelConfig, name: &str) -> Register {
    let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
    block.norm(name, hidden, eps, Register::RESIDUAL)
}
