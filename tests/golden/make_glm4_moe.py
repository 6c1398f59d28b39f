"""Makes families/glm4_moe: a tiny random model, and what a NumPy program of its own computes on it in f64.

    python tests/golden/make_glm4_moe.py

The equations are those of Transformers 5's `modeling_glm4_moe.py`: half of a head rotated by halves, norms of queries and keys by
head, sigmoid scores, experts chosen by score plus correction, weights renormalised and scaled, a shared expert, the first block dense.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TO = Path(__file__).parent / "families/glm4_moe"
HIDDEN, HEADS, KV, DIM, VOCABULARY, LAYERS = 128, 4, 2, 32, 512, 2
EXPERTS, TOP_K, WIDTH, DENSE, SCALE, EPS, THETA = 8, 2, 64, 128, 1.5, 1e-5, 10000.0

config = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "bos_token_id": 1, "dtype": "float16", "eos_token_id": 2,
    "first_k_dense_replace": 1, "head_dim": DIM, "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": DENSE,
    "max_position_embeddings": 512, "model_type": "glm4_moe", "moe_intermediate_size": WIDTH, "n_group": 1,
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": HEADS,
    "num_experts_per_tok": TOP_K, "num_hidden_layers": LAYERS, "num_key_value_heads": KV, "pad_token_id": 0,
    "rms_norm_eps": EPS, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": THETA, "rope_type": "default"},
    "routed_scaling_factor": SCALE, "tie_word_embeddings": True, "topk_group": 1, "use_qk_norm": True, "vocab_size": VOCABULARY,
}

random = np.random.default_rng(32)
tensors = {}


def matrix(name, rows, cols, wide=1.3):
    tensors[name + ".weight"] = (wide * random.standard_normal((rows, cols)) / cols**0.5).astype(np.float16)


def norm(name, size, scale=1.0):
    tensors[name + ".weight"] = (scale * (1 + 0.2 * random.standard_normal(size))).astype(np.float16)


def feed_forward(name, width):
    for part, shape in (("gate", (width, HIDDEN)), ("up", (width, HIDDEN)), ("down", (HIDDEN, width))):
        matrix(f"{name}.{part}_proj", *shape)


tensors["model.embed_tokens.weight"] = random.standard_normal((VOCABULARY, HIDDEN)).astype(np.float16)
for layer in range(LAYERS):
    own = f"model.layers.{layer}"
    norm(own + ".input_layernorm", HIDDEN)
    norm(own + ".post_attention_layernorm", HIDDEN)
    for part, heads, wide in (("q", HEADS, 1.8), ("k", KV, 1.8), ("v", KV, 1.3)):
        matrix(f"{own}.self_attn.{part}_proj", heads * DIM, HIDDEN, wide)
        tensors[f"{own}.self_attn.{part}_proj.bias"] = (0.3 * random.standard_normal(heads * DIM)).astype(np.float16)
    matrix(own + ".self_attn.o_proj", HIDDEN, HEADS * DIM)
    norm(own + ".self_attn.q_norm", DIM, 1.5)
    norm(own + ".self_attn.k_norm", DIM, 1.5)
    if layer == 0:
        feed_forward(own + ".mlp", DENSE)
        continue
    matrix(own + ".mlp.gate", EXPERTS, HIDDEN)
    tensors[own + ".mlp.gate.e_score_correction_bias"] = (0.3 * random.standard_normal(EXPERTS)).astype(np.float32)
    for expert in range(EXPERTS):
        feed_forward(f"{own}.mlp.experts.{expert}", WIDTH)
    feed_forward(own + ".mlp.shared_experts", WIDTH)
norm("model.norm", HIDDEN)
weights = {name: it.astype(np.float64) for name, it in tensors.items()}


def normed(x, name):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * weights[name + ".weight"]


def linear(x, name):
    return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)


def rotated(x):
    half = DIM // 4
    angles = np.arange(len(x))[:, None] / THETA ** (np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], -1)


def attention(x, name):
    q, k, v = (linear(x, f"{name}.{part}_proj").reshape(len(x), -1, DIM) for part in "qkv")
    q, k = rotated(normed(q, name + ".q_norm")), rotated(normed(k, name + ".k_norm"))
    k, v = (np.repeat(it, HEADS // KV, 1) for it in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / DIM**0.5
    scores = np.where(np.tril(np.ones(scores.shape[1:], bool)), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    return linear(np.einsum("hts,shd->thd", scores, v).reshape(len(x), -1), name + ".o_proj")


def gated(x, name):
    gate = linear(x, name + ".gate_proj")
    return linear(gate / (1 + np.exp(-gate)) * linear(x, name + ".up_proj"), name + ".down_proj")


def mixture(x, name):
    scores = 1 / (1 + np.exp(-linear(x, name + ".gate")))
    ranks = scores + weights[name + ".gate.e_score_correction_bias"]
    global gap
    order = np.sort(ranks, 1)
    gap = min(gap, (order[:, -TOP_K] - order[:, -TOP_K - 1]).min())
    y = gated(x, name + ".shared_experts")
    for row in range(len(x)):
        chosen = np.argsort(-ranks[row])[:TOP_K]
        own = scores[row, chosen]
        own = own / (own.sum() + 1e-20) * SCALE
        for expert, weight in zip(chosen, own):
            y[row] += weight * gated(x[row : row + 1], f"{name}.experts.{expert}")[0]
    return y


def logits(ids):
    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        own = f"model.layers.{layer}"
        x = x + attention(normed(x, own + ".input_layernorm"), own + ".self_attn")
        inner = normed(x, own + ".post_attention_layernorm")
        x = x + (gated(inner, own + ".mlp") if layer == 0 else mixture(inner, own + ".mlp"))
    return normed(x, "model.norm") @ weights["model.embed_tokens.weight"].T


gap = np.inf
ids = random.integers(3, 500, (2, 96)).astype(np.int32)
ids[:, 0] = 1
scale = (weights["model.norm.weight"] * 3.5 / logits(ids[0]).std()).astype(np.float16)
tensors["model.norm.weight"], weights["model.norm.weight"] = scale, scale.astype(np.float64)
positions = np.arange(3, 96, 4, dtype=np.int32)
expected = np.stack([logits(row)[positions] for row in ids]).astype(np.float32)
tokens, margin = ids[0, :12].tolist(), np.inf
while len(tokens) < 60:
    last = logits(np.array(tokens))[-1]
    first, second = np.sort(last)[[-1, -2]]
    margin = min(margin, first - second)
    tokens.append(int(last.argmax()))
TO.mkdir(exist_ok=True)
save_file(tensors, TO / "model.safetensors", {"format": "pt"})
save_file({"input_ids": ids, "positions": positions, "logits": expected}, TO / "logits.safetensors")
(TO / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
greedy = {"prompt": tokens[:12], "tokens": tokens[12:], "margin": round(float(margin), 4)}
(TO / "greedy.json").write_text(json.dumps(greedy) + "\n")
print("router gap", gap, "margin", margin)
