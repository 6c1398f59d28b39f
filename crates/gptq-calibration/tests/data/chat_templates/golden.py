"""Writes golden.json.gz: Transformers' output for every template here and six conversations.

    python golden.py            with the packages transformers 5.23.0 and jinja2 3.1.6

Conversations are in conversations.json, the date that strftime_now tells is fixed.
"""

import datetime
import gzip
import json
import pathlib

import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
NOW = datetime.datetime(2026, 11, 30, 8, 15)


class Fixed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


chat_template_utils.datetime = Fixed
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.BPE()),
    bos_token="<s>",
    eos_token="</s>",
    unk_token="<unk>",
    pad_token="<pad>",
)


def render(source, talk):
    try:
        return {
            "text": tokenizer.apply_chat_template(
                talk["messages"],
                tools=talk.get("tools"),
                chat_template=source,
                tokenize=False,
                add_generation_prompt=talk["add_generation_prompt"],
            )
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main():
    conversations = json.loads((HERE / "conversations.json").read_text(encoding="utf-8"))
    golden = {
        "transformers": transformers.__version__,
        "jinja2": jinja2.__version__,
        "date": NOW.isoformat(),
        "templates": {},
    }
    for path in sorted(HERE.glob("*/*.jinja")):
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(HERE).as_posix()
        golden["templates"][name] = {c: render(source, talk) for c, talk in conversations.items()}
    constructs = json.loads((HERE / "constructs.json").read_text(encoding="utf-8"))
    talk = [{"role": "user", "content": "Hi"}]
    golden["constructs"] = [
        render(source, {"messages": talk, "add_generation_prompt": False}) for source in constructs
    ]
    text = json.dumps(golden, ensure_ascii=False, indent=1)
    (HERE / "golden.json.gz").write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    every = [case for cases in golden["templates"].values() for case in cases.values()]
    print(len(golden["templates"]), "templates,", len(every), "cases,", sum("error" in c for c in every), "refused")
    print(len(constructs), "constructs,", sum("error" in c for c in golden["constructs"]), "refused")


main()
