#!/bin/bash
# Transformers 5 does not go by tokenizer.json for a LlamaTokenizer: it keeps vocabulary, merges and post-processor, and drops the
# file's normaliser and pre-tokeniser. Whether it does depends on model_type in config.json: the same three files give other ids
# in a Llama's directory than in a Mistral's. Saving and loading again changes ids once more, for `legacy` is not written.
#
# Uses transformers 5.23.0 and tokenizers from PyPI, in a temporary folder; a tokenizer of eleven tokens made here.
# Exits with 1 when any of this is no longer so.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q transformers==5.23.0 'tokenizers>=0.23,<0.24'
"$dir/venv/bin/python" - "$dir" <<'PY'
import json, os, pathlib, sys

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import tokenizers, transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer

root = pathlib.Path(sys.argv[1])
vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "▁", "H", "i", "[", "▁H", "▁Hi", "▁[", "Hi"])}
special = [dict(id=i, content=t, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
           for i, t in enumerate(["<unk>", "<s>", "</s>"])]
# As Meta's own Llama 2 file has it: a "▁" before each stretch of text, spaces as "▁".
file = dict(
    version="1.0", truncation=None, padding=None, added_tokens=special, pre_tokenizer=None, post_processor=None,
    normalizer={"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    decoder={"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    model=dict(type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None, end_of_word_suffix=None,
               fuse_unk=True, byte_fallback=False, ignore_merges=False, vocab=vocab,
               merges=["▁ H", "▁H i", "▁ [", "H i"]))
TEXTS = ["Hi", " Hi", "<s>[", "<s>Hi"]


def directory(name, model_type, **config):
    d = root / name
    d.mkdir()
    (d / "tokenizer.json").write_text(json.dumps(file))
    (d / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = dict(tokenizer_class="LlamaTokenizer", bos_token="<s>", eos_token="</s>", unk_token="<unk>", **config)
    (d / "tokenizer_config.json").write_text(json.dumps(config))
    return d


def tokens(tok):
    return [tok.convert_ids_to_tokens(tok(t)["input_ids"]) for t in TEXTS]


llama = directory("llama", "llama")
filed = [Tokenizer.from_file(str(llama / "tokenizer.json")).encode(t).tokens for t in TEXTS]
in_llama = tokens(AutoTokenizer.from_pretrained(llama))
in_mistral = tokens(AutoTokenizer.from_pretrained(directory("mistral", "mistral")))
legacy = AutoTokenizer.from_pretrained(directory("legacy", "llama", legacy=True))
legacy.save_pretrained(root / "again")
(root / "again" / "config.json").write_text(json.dumps({"model_type": "llama"}))
again = tokens(AutoTokenizer.from_pretrained(root / "again"))
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
for name, found in [("tokenizer.json by tokenizers", filed), ("AutoTokenizer, model_type mistral", in_mistral),
                    ("AutoTokenizer, model_type llama", in_llama), ("the same, legacy: true", tokens(legacy)),
                    ("that, saved and loaded again", again)]:
    print(f"{name:<34}", *map(repr, zip(TEXTS, found)))
expected = [
    in_mistral == filed,
    filed == [["▁Hi"], ["▁", "▁Hi"], ["<s>", "▁["], ["<s>", "▁Hi"]],
    in_llama == [["▁Hi"], ["▁Hi"], ["<s>", "["], ["<s>", "Hi"]],
    tokens(legacy) == [["▁Hi"], ["▁Hi"], ["<s>", "▁["], ["<s>", "▁Hi"]],
    again == in_llama,
]
print("as described" if all(expected) else f"changed: {expected}")
sys.exit(not all(expected))
PY
