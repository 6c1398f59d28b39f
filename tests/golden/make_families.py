"""Makes tests/golden/families: a tiny seeded random checkpoint of each model family, and its logits.

Run with PyTorch 2.11 and Transformers 5.17, in the repository's root, with OUT naming a folder:

    OUT=tests/golden/families python tests/golden/make_families.py

For FAMILY in llama, mistral, qwen2, llama3 (or those named as arguments, and then nothing else is made):

    FAMILY/config.json, model.safetensors   as Transformers saves them, f16
    FAMILY/logits.safetensors               input_ids i32 [2, 64], positions i32 [8], logits f32
                                            [2, 8, 512] from those f16 weights, computed in f32
    bin/                                    llama's weights again, as two pytorch_model-*.bin shards
    tokenizer.json, tokenizer_config.json   a byte-level BPE of 512 tokens, trained on the bundled text
    versions.json                           what made them

Weights are far from zero, biases and norms too, so that leaving one out shows in the logits.
"""

import json
import os
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from transformers import AutoModelForCausalLM

out = Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)

common = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=8192,
    attn_implementation="eager",
)
families = {
    # Two key heads for four query heads, a large rotary base.
    "llama": LlamaConfig(
        **common,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    # Heads wider than hidden_size / heads, a sliding window wider than any window of tokens.
    "mistral": MistralConfig(
        **common,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    # Biases on q, k and v, tied embeddings, a sliding window that is switched off.
    "qwen2": Qwen2Config(
        **common,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_sliding_window=False,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    # Llama 3.1's frequencies. Wavelengths begin at 6, 32 and 167 tokens: one of each kind, separated at
    # 64/4 and 64/1.
    "llama3": LlamaConfig(
        **common,
        num_key_value_heads=2,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}

only = sys.argv[1:]

for family, config in families.items():
    if only and family not in only:
        continue
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(0, 1 if "embed_tokens" in name else p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                p.normal_(0, 0.5)
            else:
                p.normal_(1, 0.2)
            p.copy_(p.half().float())
    model.eval()
    ids = torch.randint(0, 512, (2, 64))
    positions = torch.arange(7, 64, 8)
    with torch.no_grad():
        logits = model(ids).logits[:, positions].float().contiguous()
    print(family, "logits", tuple(logits.shape), "std", float(logits.std()), "max", float(logits.abs().max()))
    model.half().save_pretrained(out / family)
    (out / family / "generation_config.json").unlink(missing_ok=True)
    save_file(
        {"input_ids": ids.int(), "positions": positions.int(), "logits": logits},
        out / family / "logits.safetensors",
    )
    if family == "llama":
        # As Transformers 4 wrote shards: a state dict a file, and an index.
        bin = out / "bin"
        bin.mkdir(exist_ok=True)
        state = model.state_dict()
        names = list(state)
        halves = [names[: len(names) // 2], names[len(names) // 2 :]]
        weight_map = {}
        for i, part in enumerate(halves):
            file = f"pytorch_model-{i + 1:05}-of-00002.bin"
            torch.save({name: state[name] for name in part}, bin / file)
            weight_map.update({name: file for name in part})
        total = sum(t.numel() * 2 for t in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (bin / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")

if only:
    sys.exit()

rows = json.load(open("calibration/wikidoc/wikidoc_patient_information_1000.json"))
text = [f"{row['input']}\n{row['output']}" for row in rows]
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator(
    text,
    trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
)
tokenizer.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
)
tokenizer.save(str(out / "tokenizer.json"))
(out / "tokenizer_config.json").write_text(
    json.dumps(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 8192,
        },
        indent=2,
    )
    + "\n"
)

versions = {
    "python": sys.version.split()[0],
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}
(out / "versions.json").write_text(json.dumps(versions) + "\n")
