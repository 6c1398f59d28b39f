"""Loads branches in a reader on the CPU, and compares their logits with those of the dequantized weights.

    python load.py transformers|gptqmodel GOLDEN RESULTS BRANCH...

A BRANCH is a directory FIXTURE/NAME that `gptq quantize` wrote from GOLDEN/FIXTURE, which has the tokens. RESULTS gets a line of
JSON with `versions`, then one for each BRANCH, with `branch`, `quantized` (how many modules) and `moved` (the largest change that
quantization makes to a logit), and with `error`, or else `modules` (how many the reader has packed), `kernels` (their classes and
bits), `difference` (the largest of a logit from the reference), and `adapted` if it loaded but a copy: why it refused the files.

The reference is Transformers in f32 on a checkpoint without any trace of quantization, made here by `scale * (code - zero)`. The
reader loads the files in f16 and then computes in f32 too: in 16 bits, the same dense weights already differ by up to 0.2.
"""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from safetensors.torch import load_file, save_file

PACKAGES = ["transformers", "gptqmodel", "optimum", "torch"]
# Parts of names: as published, and as Transformers 5 has them in memory. Of a model around a language model, and of Mixtral.
IN_MEMORY = {
    ".block_sparse_moe.": ".mlp.",
    ".w1.": ".gate_proj.",
    ".w2.": ".down_proj.",
    ".w3.": ".up_proj.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def unpack(words, bits, dim):
    """Returns integers of `bits` bits, the low ones first, from 32-bit words along `dim`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    values = (words.movedim(dim, -1).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(-2).movedim(-1, dim)


def dequantized(tensors):
    """Returns the tensors in f32, with `weight` [out, in] in place of each packed layer's four."""
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    dense = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    for module in modules:
        qweight, groups = tensors[f"{module}.qweight"], tensors[f"{module}.g_idx"].long()
        bits = 32 * qweight.shape[0] // len(groups)
        zeros = unpack(tensors[f"{module}.qzeros"], bits, 1) + 1
        scales = dense.pop(f"{module}.scales")
        dense[f"{module}.weight"] = (scales[groups] * (unpack(qweight, bits, 0) - zeros[groups])).T.contiguous()
    return dense, len(modules)


def auto_class(branch):
    architecture = read_json(branch / "config.json")["architectures"][0]
    with_vision = architecture.endswith("ForConditionalGeneration")
    return transformers.AutoModelForImageTextToText if with_vision else transformers.AutoModelForCausalLM


def read_json(path):
    return json.loads(path.read_text())


def logits(model, tokens):
    # Transformers' own `float` refuses quantized models.
    model = torch.nn.Module.float(model.eval())
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits


def reference(branch, tokens):
    """Returns the logits of a branch's dequantized weights, and how many modules are quantized."""
    config = read_json(branch / "config.json")
    assert config.pop("quantization_config")["checkpoint_format"] == "gptq"
    dense, modules = dequantized(load_file(branch / "model.safetensors"))
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(config))
        save_file(dense, Path(directory) / "model.safetensors", {"format": "pt"})
        model, info = auto_class(branch).from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not info["unexpected_keys"] and not info["mismatched_keys"], info
    return logits(model, tokens), modules


def by_transformers(branch):
    return auto_class(branch).from_pretrained(branch, device_map="cpu", attn_implementation="eager")


def by_gptqmodel(branch):
    from gptqmodel import GPTQModel
    from gptqmodel.models.definitions.gemma3 import Gemma3ForConditionalGenerationGPTQ

    # The fixture has no processor of images.
    Gemma3ForConditionalGenerationGPTQ.require_load_processor = False
    return GPTQModel.load(str(branch), device="cpu", dtype=torch.float16, attn_implementation="eager").model


def adapt(branch, to):
    """Writes a copy under the names that GPTQModel has in memory: a language model inside another, and halves of `gate_up_proj`."""
    shutil.copytree(branch, to)
    adapted = {}
    for name, tensor in load_file(branch / "model.safetensors").items():
        for published, in_memory in IN_MEMORY.items():
            if published.startswith(".") or name.startswith(published):
                name = name.replace(published, in_memory, 1)
        if ".gate_up_proj." not in name:
            adapted[name] = tensor
            continue
        by_outputs = 0 if name.endswith((".weight", ".bias")) else 1
        halves = [tensor.clone(), tensor] if name.endswith(".g_idx") else tensor.chunk(2, by_outputs)
        for half, tensor in zip(("gate_proj", "up_proj"), halves):
            adapted[name.replace("gate_up_proj", half)] = tensor.contiguous()
    save_file(adapted, to / "model.safetensors", {"format": "pt"})
    for file in ("config.json", "quantize_config.json"):
        text = (to / file).read_text()
        for published, in_memory in IN_MEMORY.items():
            # In the patterns of `dynamic`, where a dot is escaped and a name may end.
            text = re.sub(re.escape(published.strip(".")) + r"(?=[\\|)])", in_memory.strip("."), text)
        (to / file).write_text(text)


def compare(load, branch, tokens, expected):
    model = load(branch)
    modules = [module for module in model.modules() if hasattr(module, "qweight")]
    kernels = sorted({f"{type(module).__name__} {module.bits}" for module in modules})
    difference = (logits(model, tokens) - expected).abs().max().item()
    packed = {"modules": len(modules), "kernels": kernels}
    if not math.isfinite(difference):
        return packed | {"error": "logits that are no numbers"}
    return packed | {"difference": difference}


def result(reader, branch, wanted, expected, modules):
    tokens = wanted["input_ids"].long()
    moved = (expected[:, wanted["positions"].long()] - wanted["logits"]).abs().max().item()
    line = {"branch": "/".join(branch.parts[-2:]), "quantized": modules, "moved": moved}
    load = {"transformers": by_transformers, "gptqmodel": by_gptqmodel}[reader]
    try:
        return line | compare(load, branch, tokens, expected)
    except Exception as error:
        refusal = message(error)
    if "Missing required quantized weights" not in refusal:
        return line | {"error": refusal}
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        adapt(branch, copy)
        try:
            return line | compare(load, copy, tokens, expected) | {"adapted": refusal}
        except Exception as error:
            return line | {"error": message(error)}


def message(error):
    """Returns an error's first line without directories, and without the end of a long list."""
    text = re.sub(r"'[^']*/", "'", f"{type(error).__name__}: {error}").splitlines()[0]
    return text if len(text) < 180 else text[:180].rsplit(",", 1)[0] + ", ..."


def main(reader, golden, results, branches):
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "date": str(datetime.date.today())}
    wanted = {branch: load_file(golden / branch.parent.name / "logits.safetensors") for branch in branches}
    with open(results, "w") as out, contextlib.redirect_stdout(sys.stderr):
        print(json.dumps({"versions": versions}), file=out, flush=True)
        # All references first: GPTQModel, once imported, changes how Transformers keeps experts.
        references = {branch: reference(branch, wanted[branch]["input_ids"].long()) for branch in branches}
        for branch in branches:
            line = result(reader, branch, wanted[branch], *references[branch])
            print(json.dumps(line), file=out, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], [Path(branch) for branch in sys.argv[4:]])
