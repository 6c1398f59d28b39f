#!/bin/bash
# Transformers 5 loads a mixture of experts in GPTQ's layout, one set of packed tensors an expert, without an error, and leaves
# the experts as they were initialized: it keeps the experts of a block in one tensor, which is no linear layer, so the packed
# tensors are unexpected keys and the experts missing ones. The linear layers of attention are read. The model answers, at random.
#
# Uses transformers 5.23.0 with optimum 2.3.0, gptqmodel 7.7.0 and torch from PyPI (Python 3.11), in a temporary folder; a
# Qwen3-MoE of one block made here, rounded to nearest and packed here. Exits with 1 when any of this is no longer so.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"${PYTHON:-python3.11}" -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q transformers==5.23.0 optimum==2.3.0 gptqmodel==7.7.0 accelerate==1.15.0 torch==2.15.0
"$dir/venv/bin/python" - "$dir" <<'PY'
import json, os, pathlib, sys

os.environ.update(TRANSFORMERS_VERBOSITY="error", CUDA_VISIBLE_DEVICES="")
import importlib.metadata
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

dense, packed = (pathlib.Path(sys.argv[1]) / name for name in ("dense", "packed"))
torch.manual_seed(1)
config = Qwen3MoeConfig(
    vocab_size=96, hidden_size=64, intermediate_size=64, moe_intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[], decoder_sparse_step=1,
    tie_word_embeddings=False)
Qwen3MoeForCausalLM(config).half().save_pretrained(dense)
tensors, group = {}, 32
for name, weight in load_file(dense / "model.safetensors").items():
    if not name.endswith("_proj.weight"):
        tensors[name] = weight
        continue
    module, columns = name.removesuffix(".weight"), weight.float()
    groups = columns.view(len(columns), -1, group)
    scale = (2 * groups.abs().amax(-1) / 15).half().clamp(min=1e-6)
    codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7).int().view_as(columns) + 8
    shifts = torch.arange(0, 32, 4, dtype=torch.int64)
    words = (codes.T.reshape(-1, 8, len(columns)).long() << shifts.view(1, -1, 1)).sum(1)
    tensors[f"{module}.qweight"] = words.to(torch.int32)
    tensors[f"{module}.qzeros"] = torch.full((scale.shape[1], len(columns) // 8), 0x77777777, dtype=torch.int32)
    tensors[f"{module}.scales"] = scale.T.contiguous()
    tensors[f"{module}.g_idx"] = (torch.arange(columns.shape[1]) // group).to(torch.int32)
packed.mkdir()
save_file(tensors, packed / "model.safetensors", {"format": "pt"})
settings = dict(bits=4, group_size=group, sym=True, desc_act=False, quant_method="gptq", checkpoint_format="gptq")
config = json.loads((dense / "config.json").read_text())
(packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))

reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
model, info = AutoModelForCausalLM.from_pretrained(packed, device_map="cpu", output_loading_info=True)
experts = model.model.layers[0].mlp.experts
wanted = reference.model.layers[0].mlp.experts.gate_up_proj
off = (experts.gate_up_proj.float() - wanted).norm() / wanted.norm()
attention = type(model.model.layers[0].self_attn.q_proj).__name__
missing = sorted(name for name in info["missing_keys"] if "experts" in name)
unread = sum(name.endswith(".qweight") for name in info["unexpected_keys"])
for package in ("transformers", "optimum", "gptqmodel", "torch"):
    print(package, importlib.metadata.version(package))
print("no error; q_proj is", attention)
print("missing", missing, "; packed layers not read", unread)
print(f"the experts' weights are off by {off:.2f} of their norm")
# Independent weights of the same size would be off by the square root of 2; rounded ones by a tenth.
expected = ["Linear" in attention and attention != "Linear", len(missing) == 2, unread == 12, off > 0.9]
print("as described" if all(expected) else f"changed: {expected}")
sys.exit(not all(expected))
PY
