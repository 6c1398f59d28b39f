"""Makes tests/golden/bin: typical PyTorch files, and hostile ones.

Run with PyTorch 2.11 and safetensors, in the repository's root, with OUT naming a folder:

    OUT=tests/golden/bin python tests/golden/make_bin.py

    dtypes.bin          one file: f16, bf16, f32, parameters, non-contiguous and shared storages
    dtypes.safetensors  the same values, contiguous, in the same dtypes, as PyTorch reads them back
    legacy.bin          torch.save's format before zip files
    os_system.bin       a pickle that would run a command
    deflated.bin        dtypes.bin with its entries compressed
    versions.json       versions of the programs
"""

import json
import os
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)

plain = torch.randn(6, 8)
shared = torch.randn(40)
half = torch.randn(4, 6).half()
state = OrderedDict(
    [
        ("f16", torch.randn(3, 5).half()),
        ("bf16", torch.randn(3, 5).bfloat16()),
        ("f32", torch.randn(3, 5)),
        ("parameter", torch.nn.Parameter(torch.randn(2, 3).half())),
        ("transposed", plain.t()),
        ("every_other_column", plain[:, ::2]),
        ("row_slice", plain[2:5]),
        ("transposed_f16", half.t()),
        ("shared.first", shared[:24].view(4, 6)),
        ("shared.second", shared[16:].view(2, 12)),
        ("shared.bf16", torch.arange(12).bfloat16().view(3, 4).t()),
        ("expanded", torch.tensor([1.5, -2.0]).expand(3, 2)),
        ("scalar", torch.tensor(2.5)),
        ("empty", torch.zeros(0, 4)),
        ("int64", torch.arange(3)),
        ("bool", torch.tensor([True, False])),
    ]
)
state._metadata = OrderedDict([("", {"version": 1})])  # what nn.Module.state_dict adds
torch.save(state, out / "dtypes.bin")

back = torch.load(out / "dtypes.bin", weights_only=True)
save_file(
    {name: t.detach().contiguous().clone() for name, t in back.items()},
    out / "dtypes.safetensors",
)

torch.save({"w": torch.ones(2)}, out / "legacy.bin", _use_new_zipfile_serialization=False)


class Command:
    def __reduce__(self):
        return os.system, ("touch gptq-os-system-was-here",)


torch.save({"w": torch.ones(2), "x": Command()}, out / "os_system.bin")

with zipfile.ZipFile(out / "dtypes.bin") as source, zipfile.ZipFile(
    out / "deflated.bin", "w", zipfile.ZIP_DEFLATED
) as target:
    for entry in source.infolist():
        target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)

versions = {"python": sys.version.split()[0], "torch": torch.__version__}
(out / "versions.json").write_text(json.dumps(versions) + "\n")
