"""Golden file of llama.cpp's own converter, `gguf/converted.json`:

    python make_converted.py LLAMA_CPP

LLAMA_CPP is its source, as the source distribution of llama-cpp-python 0.3.36 has it in `vendor/llama.cpp` (commit 0c1e57098, October 2026);
PyTorch 2.13.0 and Transformers 5.23.0 were used with it. For medi-tiny, whose tokenizer is one of SentencePiece, and for the families
below with the byte-level tokenizer beside them: every key of the architecture and the tokenizer, long arrays as their length and the SHA-256 of their JSON, and the
element type and dimensions of every tensor. The converter knows byte-level tokenizers by a hash of what they do, and the one
here is not among them, so it is told a name, which is not compared.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# Of the others, it wants a tokenizer of another kind.
FAMILIES = ["llama", "llama3", "qwen3", "granite", "olmo2", "smollm3", "mixtral", "qwen3_moe", "olmoe"]

source = Path(sys.argv[1]).resolve()
sys.path[:0] = [str(source), str(source / "gguf-py")]
sys.argv[1:] = []

import convert_hf_to_gguf  # noqa: E402
import gguf  # noqa: E402
from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"


def value(field):
    values = field.contents()
    if isinstance(values, list) and len(values) > 16:
        text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
        return {"length": len(values), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return values


def converted(model, tokenizer):
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        for directory, files in [(model, ["config.json", "model.safetensors"]), (tokenizer, ["tokenizer.json", "tokenizer_config.json"])]:
            for file in files:
                shutil.copy(directory / file, work)
        out = work / "out.gguf"
        sys.argv[1:] = [str(work), "--outfile", str(out), "--outtype", "f16"]
        convert_hf_to_gguf.main()
        reader = gguf.GGUFReader(out)
        arch = reader.fields["general.architecture"].contents()
        metadata = {key: value(field) for key, field in reader.fields.items() if key.startswith((arch, "tokenizer."))}
        tensors = {it.name: [it.tensor_type.name, [int(n) for n in reversed(it.shape)]] for it in reader.tensors}
        return {"architecture": arch, "metadata": dict(sorted(metadata.items())), "tensors": dict(sorted(tensors.items()))}


found = {"medi-tiny": converted(HERE.parent / "models/medi-tiny", HERE.parent / "models/medi-tiny")}
for family in FAMILIES:
    found[family] = converted(HERE / "families" / family, HERE / "families")
text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
(HERE / "gguf/converted.json").write_text(text + "\n")
