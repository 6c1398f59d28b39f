"""Makes FAMILY/{config.json,model.safetensors,logits.safetensors,greedy.json} for the dense families in its place.

    python tests/golden/make_dense_families.py shrink FROM TO    a checkpoint of 4096 tokens, made to 512
    python tests/golden/make_dense_families.py make NAME TO      one of MODELS below
    python tests/golden/make_dense_families.py vary FROM TO KEY VALUE
                                                                 FROM's weights, with another value (JSON) in its config

`make` and `vary` need PyTorch and Transformers 5.23: random weights from a seed, f16 on disk, logits in f32 with eager attention for
`input_ids` [2, 96] at every fourth position, and the 48 tokens with which it goes on after the first 12. `vary` takes the same inputs as FROM has.

`shrink` keeps the rows of the embedding, which is the head too, for every token that FROM's inputs and greedy text have, and
the first others up to 512; the logits are those of FROM, of the same rows. No other number changes.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

VOCABULARY = 512
SIZES = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             head_dim=32, vocab_size=VOCABULARY, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
             pad_token_id=0, tie_word_embeddings=True)
WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
BASES = {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}
SIGLIP = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=1,
              num_attention_heads=2, image_size=8, patch_size=4)
PIXTRAL = dict(model_type="pixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
               head_dim=16, image_size=16, patch_size=8)
GEMMA3 = dict(SIZES, num_key_value_heads=1, layer_types=WINDOWS, sliding_window=24, query_pre_attn_scalar=20,
              rope_parameters=BASES)
MODELS = {
    "seed_oss": dict(SIZES, attention_bias=True, attention_out_bias=True, mlp_bias=True),
    "exaone4": dict(SIZES, layer_types=WINDOWS, sliding_window=24),
    "olmo3": {**SIZES, "layer_types": WINDOWS, "sliding_window": 24, "rope_parameters": {
        "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}},
    "gemma3": dict(text_config=dict(GEMMA3, model_type="gemma3_text"), vision_config=SIGLIP, mm_tokens_per_image=4,
                   image_token_index=500, boi_token_index=501, eoi_token_index=502, tie_word_embeddings=True),
    "mistral3": dict(text_config=dict(SIZES, model_type="mistral", sliding_window=None, tie_word_embeddings=False),
                     vision_config=PIXTRAL, image_token_index=500, tie_word_embeddings=False),
}


def greedy(directory, prompt, tokens, margin):
    golden = {"prompt": prompt, "tokens": tokens, "margin": round(margin, 4)}
    (directory / "greedy.json").write_text(json.dumps(golden) + "\n")


def shrink(source, to):
    to.mkdir()
    expected = load_file(source / "expected.safetensors")
    text = json.loads((source / "expected.json").read_text())
    ids, logits = expected["input_ids"], expected["logits"]
    used = {0, 1, 2, *ids.flatten().tolist(), *text["prompt_ids"], *text["ids"]}
    others = (token for token in range(4096) if token not in used)
    kept = np.array(sorted(used | {next(others) for _ in range(VOCABULARY - len(used))}))
    new = {int(token): at for at, token in enumerate(kept)}
    assert len(kept) == VOCABULARY and all(new[token] == token for token in range(3))
    tensors = load_file(source / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = np.ascontiguousarray(tensors[name][kept])
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    renamed = np.array([[new[int(token)] for token in row] for row in ids], dtype=np.int32)
    positions = np.arange(3, ids.shape[1], 4, dtype=np.int32)
    logits = np.ascontiguousarray(logits[:, :, kept])
    save_file({"input_ids": renamed, "positions": positions, "logits": logits}, to / "logits.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["vocab_size"] = VOCABULARY
    (to / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    both = [[new[token] for token in text[key]] for key in ("prompt_ids", "ids")]
    greedy(to, *both, text["smallest_margin"])


def make(name, to):
    import torch
    from safetensors.torch import save_file as save
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.for_model(name, **MODELS[name])
    nested = "text_config" in MODELS[name]
    auto = AutoModelForImageTextToText if nested else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(22)
    random = lambda shape: torch.randn(shape, generator=generator)
    plus_one = name.startswith("gemma")
    with torch.no_grad():
        for key, it in model.named_parameters():
            if key.endswith("bias"):
                it.copy_(0.3 * random(it.shape))
            elif it.dim() == 1:
                scale = 1.5 if "q_norm" in key or "k_norm" in key else 1.0
                it.copy_(scale * (1.0 + 0.2 * random(it.shape)) - (1.0 if plus_one else 0.0))
            elif "embed_tokens" in key:
                # Gemma multiplies it by the root of the width.
                it.copy_((0.1 if plus_one else 1.0) * random(it.shape))
            else:
                wide = 1.8 if "q_proj" in key or "k_proj" in key else 1.3
                it.copy_(wide * random(it.shape) / it[0].numel() ** 0.5)
        ids = torch.randint(3, 500, (2, 96), generator=generator)
        ids[:, 0] = 1
        final = [it for key, it in model.named_parameters() if key.endswith("model.norm.weight")]
        final += [it for key, it in model.named_parameters() if key.endswith("language_model.norm.weight")]
        spread = model.eval()(input_ids=ids).logits.std()
        offset = 1.0 if plus_one else 0.0
        final[0].copy_((final[0] + offset) * 3.5 / spread - offset)
        model.half().save_pretrained(to)
        model = auto.from_pretrained(to, dtype=torch.float32, attn_implementation="eager").eval()
        logits = model(input_ids=ids).logits
        positions = torch.arange(3, 96, 4)
        golden = {"input_ids": ids.int(), "positions": positions.int(), "logits": logits[:, positions].contiguous()}
        save(golden, to / "logits.safetensors")
        margin = go_on(model, ids[0, :12].tolist(), to)
    (to / "generation_config.json").unlink(missing_ok=True)
    print(name, "spread", logits.std().item(), "margin", margin)


def go_on(model, context, to):
    import torch

    margin = float("inf")
    for _ in range(48):
        best = model(input_ids=torch.tensor([context]), use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        context.append(best.indices[0].item())
    greedy(to, context[:12], context[12:], margin)
    return margin


def vary(source, to, key, value):
    import torch
    from safetensors.torch import load_file as load, save_file as save
    from transformers import AutoModelForCausalLM

    to.mkdir()
    (to / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    config[key] = value
    (to / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32, attn_implementation="eager").eval()
    golden = load(source / "logits.safetensors")
    with torch.no_grad():
        logits = model(input_ids=golden["input_ids"].long()).logits
        apart = (logits[:, golden["positions"].long()] - golden["logits"]).abs().max().item()
        golden["logits"] = logits[:, golden["positions"].long()].contiguous()
        save(golden, to / "logits.safetensors")
        margin = go_on(model, golden["input_ids"][0, :12].tolist(), to)
    print(to.name, "margin", margin, "logits changed by up to", apart)


if __name__ == "__main__":
    what, source, to = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if what == "vary":
        vary(Path(source), to, sys.argv[4], json.loads(sys.argv[5]))
    else:
        shrink(Path(source), to) if what == "shrink" else make(source, to)
