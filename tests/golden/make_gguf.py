"""Golden files for GGUF, made by the package `gguf` 0.19.0 alone (numpy is all it needs):

    python make_gguf.py

`gguf/blocks.gguf`: metadata of several types, and random values as Q4_0, Q5_0 and Q8_0 with what the package dequantizes
them to, in f32, under the same name and `.values`. `gguf/names.json`: the package's name for every tensor of the model
families in `families/`, by its own tables. `gguf/tokenizers.json`: merges, special tokens and chat template that its
`SpecialVocab` reads from medi-tiny's tokenizer and from the byte-level one in `families/`.
"""

import json
import re
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize, quantize

HERE = Path(__file__).parent
OUT = HERE / "gguf"

ARCHITECTURES = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "phi3": "PHI3",
    "granite": "GRANITE",
    "olmo2": "OLMO2",
    "smollm3": "SMOLLM3",
    "mixtral": "LLAMA",
    "qwen2_moe": "QWEN2MOE",
    "qwen3_moe": "QWEN3MOE",
    "olmoe": "OLMOE",
}


def blocks():
    writer = gguf.GGUFWriter(OUT / "blocks.gguf", "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_int32("a.i32", -7)
    writer.add_float32("a.f32", 0.5)
    writer.add_uint64("a.u64", 1 << 40)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "Zwölf")
    writer.add_array("a.texts", ["eins", "▁zwei"])
    writer.add_array("a.i32s", [1, -2, 3])
    writer.add_array("a.f32s", [0.5, -1.5])
    values = np.random.default_rng(7).standard_normal((4, 96)).astype(np.float32)
    for name in ["Q4_0", "Q5_0", "Q8_0"]:
        kind = gguf.GGMLQuantizationType[name]
        packed = quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        writer.add_tensor(f"{name}.values", dequantize(packed, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def header(path):
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return [name for name in json.loads(file.read(length)) if name != "__metadata__"]


def merged(name):
    """Returns the name under which llama.cpp's converter looks up the tensor of all experts that has `name`."""
    name = re.sub(r"\.block_sparse_moe\.experts\.\d+\.", ".feed_forward.experts.", name)
    if "feed_forward" in name:
        name = name.removeprefix("model.")
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)


def names():
    found = {}
    for family, arch in ARCHITECTURES.items():
        directory = HERE / "families" / family
        layers = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], layers)
        own = {name: table.get_name(merged(name), (".weight", ".bias")) for name in header(directory / "model.safetensors")}
        found[family] = {"architecture": gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[arch]], "names": own}
    return found


def tokenizers():
    found = {}
    for name, directory in [("medi-tiny", HERE.parent / "models/medi-tiny"), ("families", HERE / "families")]:
        special = gguf.SpecialVocab(directory, load_merges=True)
        found[name] = {
            "merges": special.merges,
            "ids": special.special_token_ids,
            "adds": special.add_special_token,
            "chat_template": special.chat_template,
        }
    return found


OUT.mkdir(exist_ok=True)
blocks()
for name, value in [("names", names()), ("tokenizers", tokenizers())]:
    (OUT / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
