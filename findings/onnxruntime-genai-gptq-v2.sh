#!/bin/sh
# The model builder of onnxruntime-genai 0.18.0, and zero points of checkpoint_format "gptq_v2".
#
# AutoGPTQ's layout stores zero - 1 in version 1 ("gptq") and the zero point itself in version 2 ("gptq_v2"), which
# quantize_config.json says. The builder adds 1 whatever it says: a gptq_v2 checkpoint becomes a model whose every weight
# is one step too low, without a message. Here: a layer whose weights are scale * (code - 7) comes out as scale * (code - 8).
# What gptq does: it says that ONNX Runtime GenAI reads symmetric branches, which are version 1.
#
# Installs the packages below (4 GB, of which PyTorch most) into a temporary folder. Exits non-zero once this changes.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 onnxruntime-genai==0.18.0 onnxruntime==1.32.0 \
    onnx-ir==1.1.0 onnx==1.23.2 tokenizers==0.23.3
cat > "$dir/show.py" <<'PY'
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

work = Path(sys.argv[1])
HIDDEN, WIDE, WORDS, GROUP, ZERO = 64, 128, 64, 32, 7
rng = np.random.default_rng(7)


def checkpoint(version):
    folder = work / version
    folder.mkdir()
    half = lambda *shape: rng.standard_normal(shape).astype(np.float16)
    tensors = {"model.embed_tokens.weight": half(WORDS, HIDDEN), "lm_head.weight": half(WORDS, HIDDEN),
               "model.norm.weight": half(HIDDEN)}
    stored = ZERO - 1 if version == "gptq" else ZERO
    for name, rows, columns in [("self_attn.q_proj", HIDDEN, HIDDEN), ("self_attn.k_proj", HIDDEN, HIDDEN),
                                ("self_attn.v_proj", HIDDEN, HIDDEN), ("self_attn.o_proj", HIDDEN, HIDDEN),
                                ("mlp.gate_proj", WIDE, HIDDEN), ("mlp.up_proj", WIDE, HIDDEN),
                                ("mlp.down_proj", HIDDEN, WIDE)]:
        module = f"model.layers.0.{name}"
        tensors[f"{module}.qweight"] = rng.integers(-(2**31), 2**31, (columns // 8, rows)).astype(np.int32)
        word = sum(stored << 4 * i for i in range(8))
        tensors[f"{module}.qzeros"] = np.full((columns // GROUP, rows // 8), word, np.uint32).view(np.int32)
        tensors[f"{module}.scales"] = np.full((columns // GROUP, rows), 0.01, np.float16)
        tensors[f"{module}.g_idx"] = np.arange(columns, dtype=np.int32) // GROUP
    for name in ["input_layernorm", "post_attention_layernorm"]:
        tensors[f"model.layers.0.{name}.weight"] = half(HIDDEN)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False, "quant_method": "gptq",
                "checkpoint_format": version}
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDE,
              "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": WORDS,
              "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
              "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
              "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(WordLevel({f"w{i}": i for i in range(WORDS)}, "w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w2"}))
    return folder


def zero_points(folder):
    out = folder / "onnx"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(out), "-c", str(work)]
    subprocess.run([*command, "-p", "int4", "-e", "cpu"], check=True, capture_output=True)
    graph = onnx.load(out / "model.onnx").graph
    node = next(it for it in graph.node if it.op_type == "MatMulNBits" and "o_proj" in it.name)
    values = {it.name: it for it in graph.initializer}
    if len(node.input) < 4 or not node.input[3]:
        return {8}
    stored = numpy_helper.to_array(values[node.input[3]], base_dir=str(out)).view(np.uint8)
    return set((stored & 15).flatten().tolist()) | set((stored >> 4).flatten().tolist())


print("onnxruntime-genai", importlib.metadata.version("onnxruntime-genai"))
found = {version: zero_points(checkpoint(version)) for version in ["gptq", "gptq_v2"]}
print("zero points of 7 in the built models:", found)
sys.exit(found != {"gptq": {7}, "gptq_v2": {8}})
PY
"$dir/venv/bin/python" "$dir/show.py" "$dir" 2>/dev/null
