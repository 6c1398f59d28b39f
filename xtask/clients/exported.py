"""Reads exported branches with programs that nobody here wrote, and compares every weight with the branch.

    python exported.py BRANCHES EXPORTED

BRANCHES has the branches that `gptq quantize` wrote, EXPORTED the same names in `compressed-tensors/`, `mlx/` and `gguf/`. Each
program is asked only where it is installed: compressed-tensors (with PyTorch), mlx, and gguf. One line of JSON for each branch and
program: `branch`, `reader`, `version`, and `differing`, the number of weights that differ from `scale * (code - zero)`, or `error`.
With llama-cpp-python, mlx-lm or Transformers beside them, `loads` says whether the model loads.
"""

import importlib.util
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np

DTYPES = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "U32": np.uint32, "I64": np.int64}


def tensors(path):
    """Returns the tensors of a safetensors file by name."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = np.frombuffer(data[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def unpacked(words, bits):
    """Returns codes from words along the first dimension, low bits first, across the bounds of words."""
    stream = np.unpackbits(words.view(np.uint8).reshape(*words.shape, 4), axis=-1, bitorder="little")
    stream = np.moveaxis(stream, -1, 1).reshape(-1, *words.shape[1:])
    values = stream.reshape(-1, bits, *words.shape[1:])
    return (values * (1 << np.arange(bits)).reshape(1, -1, *[1] * (words.ndim - 1))).sum(1)


def expected(branch):
    """Returns the weights [out, in] of a branch in AutoGPTQ's layout, in f32, by module."""
    files, settings = tensors(branch / "model.safetensors"), json.loads((branch / "quantize_config.json").read_text())
    weights = {}
    for name in files:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        part = {suffix: files[f"{module}.{suffix}"] for suffix in ["qweight", "qzeros", "scales", "g_idx"]}
        bits = 32 * part["qweight"].shape[0] // len(part["g_idx"])
        codes = unpacked(part["qweight"], bits)
        zeros = unpacked(np.ascontiguousarray(part["qzeros"].T), bits).T
        if settings["checkpoint_format"] == "gptq":
            zeros = (zeros + 1) % (1 << bits)
        groups = part["g_idx"]
        weights[module] = (part["scales"].astype(np.float32)[groups] * (codes - zeros[groups])).T
    return weights


def by_gguf(path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path.with_suffix(".gguf"))
    text = lambda key: bytes(reader.fields[key].parts[-1]).decode()
    number = lambda key: int(reader.fields[f"{text('general.architecture')}.{key}"].parts[-1][0])
    heads = {"attn_q": number("attention.head_count"), "attn_k": number("attention.head_count_kv")}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"}  # fmt: skip
    weights = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if len(parts) != 4 or parts[2] not in names:
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        if parts[2] in heads and text("general.architecture") == "llama":
            # From pairs of neighbours to halves of a head.
            values = values.reshape(heads[parts[2]], -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        weights[f"model.layers.{parts[1]}.{names[parts[2]]}"] = values
    return weights


def by_mlx(path):
    import mlx.core as mx

    files = mx.load(str(path / "model.safetensors"))
    settings = json.loads((path / "config.json").read_text())["quantization"]
    weights = {}
    for name in files:
        if not name.endswith(".scales"):
            continue
        module = name.removesuffix(".scales")
        own = settings.get(module, settings)
        parts = [files[f"{module}.{part}"] for part in ["weight", "scales", "biases"]]
        # In f32, so that nothing is rounded.
        parts = [parts[0], *(part.astype(mx.float32) for part in parts[1:])]
        weights[module] = np.array(mx.dequantize(*parts, group_size=own["group_size"], bits=own["bits"]))
    return weights


def by_compressed_tensors(path):
    import torch
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    config = json.loads((path / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    files, weights = load_file(path / "model.safetensors"), {}
    for name in files:
        if not name.endswith(".weight_packed"):
            continue
        module = name.removesuffix(".weight_packed")
        state = {key.removeprefix(module + "."): value for key, value in files.items() if key.startswith(module + ".")}
        state["weight_scale"] = state["weight_scale"].float()
        bits = 32 * state["weight_packed"].shape[1] // int(state["weight_shape"][1])
        scheme = next(group for group in groups if group.weights.num_bits == bits)
        weights[module] = PackedQuantizationCompressor.decompress(state, scheme)["weight"].to(torch.float32).numpy()
    return weights


def loads(format, path):
    """Loads the model as its users do; `None` where the program is missing."""
    try:
        if format == "gguf":
            import llama_cpp

            llama_cpp.Llama(str(path.with_suffix(".gguf")), verbose=False, n_ctx=32).tokenize(b"a")
        elif format == "mlx":
            from mlx_lm.utils import load_model

            load_model(path)
        else:
            import transformers

            transformers.AutoModelForCausalLM.from_pretrained(path)
        return True
    except ImportError:
        return None


READERS = {
    "gguf": ("gguf", by_gguf),
    "mlx": ("mlx", by_mlx),
    "compressed-tensors": ("compressed_tensors", by_compressed_tensors),
}


def main(branches, exported):
    for branch in sorted(path for path in branches.iterdir() if (path / "config.json").exists()):
        wanted = expected(branch)
        for format, (package, read) in READERS.items():
            path = exported / format / branch.name
            if importlib.util.find_spec(package) is None or not (path.exists() or path.with_suffix(".gguf").exists()):
                continue
            line = {"branch": branch.name, "reader": format, "version": importlib.metadata.version(package.replace("_", "-"))}
            try:
                found = read(path)
                assert wanted.keys() <= found.keys(), wanted.keys() - found.keys()
                line["differing"] = int(sum((found[name] != weight).sum() for name, weight in wanted.items()))
                line["loads"] = loads(format, path)
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
