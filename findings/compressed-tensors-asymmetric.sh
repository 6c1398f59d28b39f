#!/bin/sh
# compressed-tensors 0.20.0, and asymmetric codes in pack-quantized files that Transformers 5.23 loads.
#
# A pack-quantized file has `weight_zero_point` packed along the outputs, [out * bits / 32, groups], and that is how the
# library itself writes it. On the meta device, where Transformers lays out an empty model before it reads a file,
# `PackedQuantizationCompressor.compress` packs the weights but leaves the zero points as they are, [out, groups]. So
# Transformers finds another shape in every asymmetric file, and refuses it: "You set `ignore_mismatched_sizes` to
# `False`, thus raising an error". Symmetric files have no such tensor and load.
# What gptq does: it writes the layout that the library writes and vLLM reads, and says that Transformers reads symmetric
# branches only.
#
# Installs compressed-tensors 0.20.0 and PyTorch 2.13.0 (3 GB) into a temporary folder. Exits non-zero once this changes.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 compressed-tensors==0.20.0
cat > "$dir/show.py" <<'PY'
import sys

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

print("compressed-tensors", compressed_tensors.__version__)
weights = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=64)
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
shapes = {}
for device in ["cpu", "meta"]:
    state = {
        "weight": torch.zeros(256, 128, device=device),
        "weight_scale": torch.ones(256, 2, device=device),
        "weight_zero_point": torch.zeros(256, 2, dtype=torch.int8, device=device),
    }
    state = PackedQuantizationCompressor.compress(state, scheme)
    shapes[device] = {name: tuple(state[name].shape) for name in ["weight_packed", "weight_zero_point"]}
    print(device, shapes[device])
same = shapes["cpu"]["weight_packed"] == shapes["meta"]["weight_packed"] == (256, 16)
apart = (shapes["cpu"]["weight_zero_point"], shapes["meta"]["weight_zero_point"]) == ((32, 2), (256, 2))
sys.exit(not (same and apart))
PY
"$dir/venv/bin/python" "$dir/show.py" 2>/dev/null
