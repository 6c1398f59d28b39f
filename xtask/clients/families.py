"""Runs exported branches of every model family in llama.cpp, and compares logits with those of Transformers for the dense model.

    python families.py models FIXTURES MODELS   with PyTorch and Transformers: the models, each with `dense.npz`
    python families.py run MODELS GGUFS         with llama-cpp-python: one line of JSON for each of GGUFS/NAME.gguf

Models are the fixtures in `tests/golden/families`, with the settings that llama.cpp computes without being told where a fixture
has others on purpose, and two mixtures of experts with random weights, whose fixtures llama.cpp does not run. A line has
`error`, the distance of the logits of branches of 8 bits from the dense ones, each position centred, relative to their length.
"""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import numpy as np

# More than the fixture of longrope was made for: llama.cpp goes by its context, of at least 256, Transformers by the text.
TOKENS = 96
EDITS = {
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32, "layer_types": ["sliding_attention"] * 3},
    "smollm3": {"no_rope_layers": [1] * 3},
}
SIZES = dict(hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
             max_position_embeddings=512, num_experts=8, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)  # fmt: skip
MADE = {
    "qwen2_moe-made": dict(SIZES, model_type="qwen2_moe", num_key_value_heads=2, moe_intermediate_size=64,
                           shared_expert_intermediate_size=96, decoder_sparse_step=1),  # fmt: skip
    "olmoe-made": dict(SIZES, model_type="olmoe", num_key_value_heads=4, tie_word_embeddings=True),
}


def models(fixtures, models):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    models.mkdir(parents=True)
    tokens = np.random.default_rng(7).integers(3, 500, (2, TOKENS))
    for name in [*sorted(path.parent.name for path in fixtures.glob("*/config.json")), *MADE]:
        # llama.cpp asks the vocabulary of a model whose name has "phi3" in it for a token that this one lacks.
        directory = models / name.replace("phi3", "phi")
        directory.mkdir()
        if name in MADE:
            torch.manual_seed(7)
            settings = dict(MADE[name])
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn_like(weight) * 0.1)
            model.half().save_pretrained(directory)
        else:
            shutil.copy(fixtures / name / "model.safetensors", directory)
            config = json.loads((fixtures / name / "config.json").read_text())
            config.update(EDITS.get(name, {}))
            (directory / "config.json").write_text(json.dumps(config))
        for file in ["tokenizer.json", "tokenizer_config.json"]:
            shutil.copy(fixtures / file, directory)
        try:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
        except ValueError:
            # Text models beside a vision tower, which llama.cpp does not run from our files.
            shutil.rmtree(directory)
            continue
        with torch.no_grad():
            logits = model(torch.tensor(tokens)).logits.float().numpy()
        np.savez(directory / "dense.npz", tokens=tokens, logits=logits)


def run(models, files):
    from exported import llama_cpp_model

    version = f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}"
    for path in sorted(files.glob("*.gguf")):
        line = {"model": path.stem, "reader": version}
        dense = np.load(models / path.stem / "dense.npz")
        try:
            model = llama_cpp_model(path, TOKENS)
            found = []
            for window in dense["tokens"]:
                model.reset()
                model.eval(window.tolist())
                found.append(np.array(model.scores[:TOKENS]))
            centred = [it - it.mean(-1, keepdims=True) for it in (np.stack(found), dense["logits"])]
            line["error"] = float(np.linalg.norm(centred[0] - centred[1]) / np.linalg.norm(centred[1]))
        except Exception as error:
            line["refused"] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    {"models": models, "run": run}[sys.argv[1]](*map(Path, sys.argv[2:]))
