"""Compares GPTQModel's kernels on a card with its kernel in PyTorch, on branches of the bundled model.

    python gptqmodel_kernels.py KERNEL,... BRANCH...

A KERNEL is the name of a `BACKEND` of GPTQModel, such as GPTQ_TRITON, GPTQ_EXLLAMA_V2 or GPTQ_MARLIN; the last two are compiled at first
use, which takes minutes. A line for each kernel and branch: the classes of the layers, the largest difference of a logit, computed in f16,
from that of GPTQ_TORCH, and how often both have the same most likely token, over 600 random tokens; or the reader's error.
"""

import sys
import time

import torch
import transformers
from gptqmodel import BACKEND, GPTQModel, __version__

VOCABULARY = 4096


def logits(branch, kernel, ids):
    """Returns the logits of a branch by a kernel, and the classes of its quantized layers."""
    model = GPTQModel.load(branch, backend=getattr(BACKEND, kernel), device="cuda", dtype=torch.float16).model
    with torch.inference_mode():
        found = model(input_ids=ids).logits.float()
    names = {type(module).__name__ for module in model.modules()}
    return found, sorted(name for name in names if name.endswith("Linear") and name != "Linear")


def main():
    kernels, branches = sys.argv[1].split(","), sys.argv[2:]
    print(f"GPTQModel {__version__}, PyTorch {torch.__version__}, Transformers {transformers.__version__}, {torch.cuda.get_device_name(0)}")
    ids = torch.randint(0, VOCABULARY, (2, 300), generator=torch.Generator().manual_seed(1)).cuda()
    for branch in branches:
        expected, _ = logits(branch, "GPTQ_TORCH", ids)
        for kernel in kernels:
            started = time.time()
            try:
                found, classes = logits(branch, kernel, ids)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                print(f"{branch} {kernel}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                continue
            difference = (found - expected).abs().max().item()
            same = (found.argmax(-1) == expected.argmax(-1)).float().mean().item()
            seconds = time.time() - started
            largest = expected.abs().max().item()
            print(f"{branch} {kernel} {classes}: {difference:.2g} of up to {largest:.1f}, same token {100 * same:.1f} %, {seconds:.1f} s", flush=True)


main()
