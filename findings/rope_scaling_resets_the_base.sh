#!/bin/sh
# Transformers 5 and a rope_scaling added to a config.json that Transformers 5 wrote.
#
# Model cards tell users to add "rope_scaling" to config.json for long contexts. In a file of Transformers 5 the
# base of the rotary frequencies stands in "rope_parameters" alone; an added "rope_scaling" replaces that object as
# a whole, and the base falls back to 10000 without a word. Here: 1000000 becomes 10000.
# What gptq does: it computes what Transformers computes, and writes both spellings, each with its base.
#
# Installs Transformers 5.23.0 (no PyTorch) into a temporary folder. Exits non-zero once this changes.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet transformers==5.23.0
cat > "$dir/config.json" <<'JSON'
{"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
 "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 32768,
 "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
JSON
cat > "$dir/show.py" <<'PY'
import json, sys
import transformers
from transformers import AutoConfig

folder = sys.argv[1]
print("transformers", transformers.__version__)
before = AutoConfig.from_pretrained(folder).rope_parameters
print("as written:", before)
config = json.load(open(folder + "/config.json"))
config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
json.dump(config, open(folder + "/config.json", "w"))
after = AutoConfig.from_pretrained(folder).rope_parameters
print("with rope_scaling added:", after)
sys.exit(not (before["rope_theta"] == 1000000.0 and after["rope_theta"] == 10000.0))
PY
"$dir/venv/bin/python" "$dir/show.py" "$dir" 2>/dev/null
