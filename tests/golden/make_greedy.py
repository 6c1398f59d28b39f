"""Makes FAMILY/greedy.json for each directory named as an argument, with Transformers' continuation.

Run with PyTorch and Transformers 5.23, in the repository's root:

    python tests/golden/make_greedy.py tests/golden/families/llama ...

`prompt`: the first 12 ids of the first row in logits.safetensors. `tokens`: the 48 that follow greedily, without a cache, in
f32 on the fp16 weights. `margin`: the smallest lead of any of them over the second.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

for directory in map(Path, sys.argv[1:]):
    prompt = load_file(directory / "logits.safetensors")["input_ids"][0, :12].tolist()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    context, margin = list(prompt), float("inf")
    with torch.no_grad():
        for _ in range(48):
            logits = model(torch.tensor([context]), use_cache=False).logits[0, -1]
            best = logits.topk(2)
            margin = min(margin, (best.values[0] - best.values[1]).item())
            context.append(best.indices[0].item())
    golden = {"prompt": prompt, "tokens": context[12:], "margin": round(margin, 4)}
    (directory / "greedy.json").write_text(json.dumps(golden) + "\n")
    print(directory, margin)
