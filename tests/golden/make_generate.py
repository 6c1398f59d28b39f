"""Greedy continuations and rendered chat templates by Transformers: generate.json.

Runs in the repository's root with PyTorch and Transformers; writes to the folder in OUT. For each
model: prompts (their token ids by the model's own tokenizer.json), the 64 tokens that greedy
decoding in f32 on the fp16 weights appends (no stop token), and the smallest gap between the best
and the second-best logit along the way. The chat templates are rendered by
`PreTrainedTokenizerBase.apply_chat_template`.
"""

import json
import os
import pathlib

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PROMPTS = [
    "What are the symptoms of Asthma?",
    "What causes a cold?\n",
    "Diabetes is",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2's own: string methods, slices, and an exception on roles out of turn.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Written over lines, as in newer files: blocks eat their own line.
LINES = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' or message.role == 'system' %}
        {{- '<|' ~ message.role ~ '|>\n' ~ message.content | trim }}
    {%- else %}
        {{- '<|assistant|>\n' ~ message.content.split('</think>')[-1] | trim ~ eos_token }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""
TALK = [
    {"role": "system", "content": "You are a careful doctor."},
    {"role": "user", "content": " What is asthma?\nBriefly. "},
    {"role": "assistant", "content": "A disease of the airways.\n"},
    {"role": "user", "content": "How is it treated?"},
]


def greedy(model, ids):
    settings = dict(do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=0)
    out = model.generate(
        torch.tensor([ids]), output_logits=True, return_dict_in_generate=True, **settings
    )
    best = torch.stack(out.logits).float().topk(2, dim=-1).values[:, 0]
    gap = (best[:, 0] - best[:, 1]).min().item()
    return out.sequences[0, len(ids):].tolist(), gap


result = {"transformers": transformers.__version__, "torch": torch.__version__, "models": {}}
for directory in ["tests/models/medi-tiny", ".gpu/medi-24m"]:
    directory = pathlib.Path(directory)
    if not directory.exists():
        print(directory, "is not here")
        continue
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    rows = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        tokens, gap = greedy(model, ids)
        assert len(tokens) == 64
        rows.append(
            {"prompt": prompt, "ids": ids, "tokens": tokens, "text": tokenizer.decode(tokens), "smallest_gap": gap}
        )
        print(directory.name, repr(prompt), gap, repr(rows[-1]["text"]))
    result["models"][directory.name] = rows

tokenizer = PreTrainedTokenizerFast(
    tokenizer_file="tests/models/medi-tiny/tokenizer.json", bos_token="<s>", eos_token="</s>"
)
result["chat"] = {"messages": TALK, "templates": []}
for name, template in [("chatml", CHATML), ("llama2", LLAMA2), ("lines", LINES)]:
    for prompt in [True, False]:
        text = tokenizer.apply_chat_template(
            TALK, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        result["chat"]["templates"].append(
            {"name": name, "template": template, "add_generation_prompt": prompt, "text": text}
        )

out = pathlib.Path(os.environ["OUT"])
(out / "generate.json").write_text(json.dumps(result, indent=1) + "\n")
