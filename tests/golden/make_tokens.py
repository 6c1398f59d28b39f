"""Token ids of awkward texts by Transformers and by the `tokenizers` library: tokens.json.

Runs in the repository's root with Transformers; writes to the folder in OUT. Each case is a tokenizer.json of this
repository, changed where `patch` says so, with the files that stand beside it. For each text and case: the ids that
`AutoTokenizer` gives ("transformers"), and, where they differ, those of tokenizer.json as it is ("filed"). The added
tokens, the end token, and whether documents get one, are written down too.

The cases `llama2_*` are tokenizers as Llama 2's file has them in its two forms: with the normaliser of Meta's own
(medi-tiny's file), and with a Metaspace pre-tokeniser, as Transformers 5 saves it. `smollm2` is made of
SmolLM2-135M's vocabulary and merges (Apache-2.0), cut to the first 2000 merges; give its directory in SMOLLM2.
"""

import json
import os
import pathlib
import shutil
import tempfile

import tokenizers
import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer

TEXTS = [
    "", " ", "  ", "\n", "\t\n ", "Hello", " Hello", "  Hello", "Hello ", "Hello  world", "Hello\nworld", "\nHello", "Hello\n\n\n",
    "a\r\nb", "don't we'll I'M", "naïve café", "cafe\u0301", "\u212b \ufb01 \u2460", "咳嗽 と せき", "아스마", "🫁", "👩‍⚕️ 🇨🇭",
    "\ufffd", "\u0000", "\u200b\u200d\ufeff", "\u00a0Hello\u00a0", "1234567890", "37,5 °C at 10:30 on 2024-01-31", "x" * 40, "_" * 20,
    "<s>", "</s>", "<s>Hello", "Hello</s>", "Hello </s> world", "<s> Hello", "Hello<s>world</s>", "<s>[INST] Hi [/INST] Hello </s><s>[INST] x",
    "<unk>", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "a<|im_start|>b", " <|im_end|> ", "<|im_start|><|im_start|>",
    "<|im_end|>s", "<|endoftext|>", "▁", "▁Hello ▁ world", "<0x41>\\u0041", "Asthma is a disease.\tIt   has {braces} & <tags>.",
    "What are the symptoms of Fever?\nHot, hot; HOT!",
]
assert len(TEXTS) == 50 and len(set(TEXTS)) == 50

LLAMA = json.loads(pathlib.Path("tests/models/medi-tiny/tokenizer_config.json").read_text())
METASPACE = {
    "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
}


def flags(content, **more):
    off = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    return {**off, "content": content, **more}


START, END = flags("<|im_start|>", rstrip=True), flags("<|im_end|>", lstrip=True)
ENDS = {  # a post-processor that ends documents itself
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in [("<s>", 1), ("</s>", 2)]},
    }
}
MEDI, BYTES = "tests/models/medi-tiny/tokenizer.json", "tests/golden/families/tokenizer.json"


def case(name, source, config, model_type="llama", patch=None, **files):
    return dict(name=name, source=source, model_type=model_type, patch=patch or {}, files={"tokenizer_config.json": config, **files})


def named(**more):
    return dict(LLAMA, **more)


CASES = [
    case("llama2_normalizer", MEDI, LLAMA),
    case("llama2_normalizer_not_legacy", MEDI, named(legacy=False)),
    case("llama2_normalizer_no_prefix_space", MEDI, named(add_prefix_space=False)),
    case("llama2_metaspace", MEDI, {k: v for k, v in LLAMA.items() if k != "legacy"}, patch=METASPACE),
    case("llama2_in_mistral", MEDI, LLAMA, "mistral"),
    case("llama2_metaspace_in_mixtral", MEDI, LLAMA, "mixtral", METASPACE),
    case("llama2_in_qwen2", MEDI, LLAMA, "qwen2"),
    case("llama2_in_qwen3", MEDI, named(tokenizer_class="LlamaTokenizerFast"), "qwen3"),
    case("llama2_in_phi3", MEDI, LLAMA, "phi3"),
    case("gemma_class", MEDI, dict(LLAMA, tokenizer_class="GemmaTokenizer"), "gemma2"),
    case("code_llama_class", MEDI, dict(LLAMA, tokenizer_class="CodeLlamaTokenizer")),
    case("no_class", MEDI, {"eos_token": "</s>"}),
    case("ends_itself", MEDI, LLAMA, patch=ENDS),
    case("ends_itself_as_filed", MEDI, LLAMA, "mistral", ENDS),
    case("byte_level", BYTES, json.loads(pathlib.Path("tests/golden/families/tokenizer_config.json").read_text())),
    case("byte_level_as_llama", BYTES, {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}),
    case("byte_level_as_gpt2", BYTES, {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}),
    case("byte_level_as_gpt_neox", BYTES, {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "</s>"}, "gpt_neox"),
    case("byte_level_in_qwen2", BYTES, {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>", "pad_token": "</s>"}, "qwen2"),
    # Tokens that tokenizer.json does not know.
    case("decoder_alone", MEDI, named(eos_token="<|im_end|>", added_tokens_decoder={"4096": START, "4097": END})),
    case("decoder_alone_as_filed", MEDI, named(eos_token="<|im_end|>", added_tokens_decoder={"4096": START, "4097": END}), "mistral"),
    case("decoder_with_a_gap", MEDI, named(added_tokens_decoder={"4100": END, "4098": START}), "mistral"),
    case("decoder_over_the_file", MEDI, named(added_tokens_decoder={"2": flags("</s>", lstrip=True, rstrip=True)}), "mistral"),
    case("decoder_and_map", MEDI, named(added_tokens_decoder={"4096": START}), "mistral",
         **{"special_tokens_map.json": {"eos_token": "<|im_end|>"}}),
    case("added_tokens", MEDI, LLAMA, **{"added_tokens.json": {"<|im_start|>": 4096, "<|im_end|>": 4097}}),
    case("added_tokens_special", MEDI, named(extra_special_tokens=["<|im_end|>"]), "mistral",
         **{"added_tokens.json": {"<|im_end|>": 4097, "<|im_start|>": 4096}}),
    case("map_over_config", MEDI, named(eos_token="</s>"), "mistral", **{"special_tokens_map.json": {"eos_token": "<s>"}}),
    case("map_with_objects", MEDI, LLAMA, "mistral", **{"special_tokens_map.json": {
        "eos_token": {k: v for k, v in END.items() if k != "special"}, "additional_special_tokens": ["<|im_start|>"]}}),
    case("map_alone", MEDI, {}, "mistral", **{"special_tokens_map.json": {"eos_token": "</s>", "bos_token": "<s>"}}),
    case("named_text", MEDI, named(eos_token="<|im_end|>", pad_token="<|im_start|>"), "mistral"),
    case("named_object", MEDI, named(eos_token=dict(END, __type="AddedToken")), "mistral"),
    case("named_object_rebuilt", MEDI, named(eos_token=dict(END, __type="AddedToken"), pad_token=None)),
    case("additional_list", MEDI, named(additional_special_tokens=["<|im_start|>", dict(END, __type="AddedToken")]), "mistral"),
    case("extra_list", MEDI, named(extra_special_tokens=["<|im_start|>", "<|im_end|>"])),
    case("extra_object", MEDI, named(extra_special_tokens={"image_token": "<|im_start|>"}, boi_token="<|im_end|>"), "mistral"),
    case("extra_before_additional", MEDI, named(extra_special_tokens=["<|im_end|>"], additional_special_tokens=["<|im_start|>"]), "mistral"),
    case("from_the_vocabulary", MEDI, named(extra_special_tokens=["▁of", "[/INST]"]), "mistral"),
    case("not_split", MEDI, named(split_special_tokens=True), "mistral"),
]


def smollm2(directory):
    """The first 2000 merges over the bytes, and the special tokens."""
    full = json.loads((directory / "tokenizer.json").read_text())
    merges = [m.split(" ") if isinstance(m, str) else m for m in full["model"]["merges"]][:2000]
    special = [t["content"] for t in full["added_tokens"]][:17]
    letters = [t for t in sorted(full["model"]["vocab"], key=full["model"]["vocab"].get) if len(t) == 1]
    vocab = {}
    for token in special + letters + ["".join(m) for m in merges]:
        vocab.setdefault(token, len(vocab))
    full["model"].update(vocab=vocab, merges=merges)
    full["added_tokens"] = [dict(t, id=vocab[t["content"]]) for t in full["added_tokens"] if t["content"] in special]
    return full


def run(case, cut):
    source = json.loads(pathlib.Path(case["source"]).read_text()) if case["source"] != "smollm2" else dict(cut)
    source.update(case["patch"])
    with tempfile.TemporaryDirectory() as d:
        d = pathlib.Path(d)
        (d / "tokenizer.json").write_text(json.dumps(source))
        (d / "config.json").write_text(json.dumps({"model_type": case["model_type"]}))
        for name, value in case["files"].items():
            (d / name).write_text(json.dumps(value))
        tok = AutoTokenizer.from_pretrained(d)
        filed = Tokenizer.from_file(str(d / "tokenizer.json"))
        ours = [tok(t)["input_ids"] for t in TEXTS]
        plain = [filed.encode(t).ids for t in TEXTS]
        added = {str(i): t.__getstate__() for i, t in sorted(tok.added_tokens_decoder.items())}
        return dict(
            case,
            type=type(tok).__name__,
            eos=tok.eos_token_id,
            eos_token=tok.eos_token,
            added=added,
            transformers=ours,
            filed={str(i): p for i, (o, p) in enumerate(zip(ours, plain)) if o != p},
        )


def main():
    out = pathlib.Path(os.environ["OUT"])
    cut = None
    cases = list(CASES)
    if "SMOLLM2" in os.environ:
        directory = pathlib.Path(os.environ["SMOLLM2"])
        cut = smollm2(directory)
        (out / "smollm2_tokenizer.json").write_text(json.dumps(cut, ensure_ascii=False, separators=(",", ":")))
        config = json.loads((directory / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        cases += [
            case("smollm2", "smollm2", config),
            case("smollm2_as_gpt2", "smollm2", dict(config, tokenizer_class="GPT2Tokenizer")),
        ]
    done = [run(c, cut) for c in cases]
    for c in done:
        print(c["name"], c["type"], "eos", c["eos"], "differ", len(c["filed"]))
    rows = lambda ids: "[\n  " + ",\n  ".join(json.dumps(i, separators=(",", ":")) for i in ids) + "]"
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    text = '{"versions": %s,\n"texts": %s,\n"cases": [' % (json.dumps(versions), json.dumps(TEXTS))
    text += ",\n".join(
        "{" + ",\n ".join(
            f"{json.dumps(k)}: " + (rows(v) if k == "transformers" else json.dumps(v, ensure_ascii=False, separators=(",", ":")))
            for k, v in c.items()) + "}" for c in done)
    (out / "tokens.json").write_text(text + "]}\n")


main()
