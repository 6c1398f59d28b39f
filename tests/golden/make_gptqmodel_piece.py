"""Cuts a checkpoint written by GPTQModel down to what medi-tiny does not already hold.

    python3 tests/golden/make_gptqmodel_piece.py BRANCH tests/models/medi-tiny tests/golden/gptqmodel_w4g128-act

BRANCH holds medi-tiny as GPTQModel wrote it and `expected_logits.safetensors`. Its embedding, norms and
head must be medi-tiny's own, byte for byte; they are left out. Logits are kept at every eighth
position. Needs nothing but Python.
"""

import json
import pathlib
import shutil
import struct
import sys


def read(path):
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    data = raw[8 + n :]
    return {k: (v["dtype"], v["shape"], data[slice(*v["data_offsets"])]) for k, v in header.items()}


def write(path, tensors):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


branch, base, out = map(pathlib.Path, sys.argv[1:])
own, dense = read(branch / "model.safetensors"), read(base / "model.safetensors")
left_out = {name for name in own if name in dense}
for name in left_out:
    assert own[name] == dense[name], name
write(out / "linears.safetensors", {k: v for k, v in own.items() if k not in left_out})

expected = read(branch / "expected_logits.safetensors")
dtype, (windows, seq, vocabulary), raw = expected["logits"]
positions = range(0, seq, 8)
row = 4 * vocabulary
kept = b"".join(raw[(w * seq + p) * row :][:row] for w in range(windows) for p in positions)
write(
    out / "logits.safetensors",
    {
        "input_ids": expected["input_ids"],
        "positions": ("I32", [len(positions)], struct.pack(f"<{len(positions)}i", *positions)),
        "logits": (dtype, [windows, len(positions), vocabulary], kept),
    },
)
for name in ["config.json", "quantize_config.json"]:
    shutil.copy(branch / name, out / name)
