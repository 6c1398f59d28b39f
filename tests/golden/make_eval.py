"""Makes tests/golden/eval/*.json: what lm-evaluation-harness makes of multiple-choice tasks, question by question.

Run with lm_eval 0.4.13, PyTorch 2.15 and Transformers 5.24, in the repository's root:

    python tests/golden/make_eval.py [--results | MODEL OUT [QUESTIONS]]

With --results it makes results.json alone, which the harness writes itself (--output_path). Without arguments it makes the values of the tests, with medi-tiny (with and without its BOS) and with a model whose tokenizer
adds none and whose context is 512 tokens: the weights of families/qwen3 with smollm2_tokenizer.json. With them, it runs PubMedQA
(ori_pqal.json and test_ground_truth.json in the directory PUBMEDQA, by default those of tests/data) on another model and writes
to OUT.

Models run in f32 on their fp16 weights, on the CPU, one request at a time (so that nothing is padded). Of each question: the
log-likelihood of each choice, and the harness's acc and acc_norm. Of each task: the two and their standard errors, and how many
requests the harness cut. Prompts are kept as SHA-256. Shots are the first rows of the training split (`sampler: first_n`).
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import datasets
import lm_eval
import torch
import transformers
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
LETTERS = "ABCDEFGHIJ"


def pubmedqa(shots, limit):
    """The harness's own task (lm_eval/tasks/pubmedqa), on files."""
    folder = Path(os.environ.get("PUBMEDQA", DATA / "pubmedqa"))
    rows = json.loads((folder / "ori_pqal.json").read_text())
    test = json.loads((folder / "test_ground_truth.json").read_text())

    def documents(keys):
        return [{**rows[key], "key": key} for key in keys]

    def text(doc):
        return "Abstract: {}\nQuestion: {}\nAnswer:".format("\n".join(doc["CONTEXTS"]), doc["QUESTION"])

    splits = {
        "test": documents([key for key in rows if key in test][:limit]),
        "train": documents([key for key in rows if key not in test]),
    }
    return task(f"pubmedqa-{shots}", splits, text, ["yes", "no", "maybe"], "final_decision", " ", shots)


def choices(name, delimiter):
    """Rows in gptq's own layout."""
    rows = [json.loads(line) for line in (DATA / "choices" / f"{name}.jsonl").read_text().splitlines()]
    for row in rows:
        answer = row.pop("answer")
        row["target"] = LETTERS.index(answer) if isinstance(answer, str) else answer
        context, question = row.pop("context", None), row.pop("question", None)
        if question is not None:
            row["prompt"] = f"{context}\nQuestion: {question}\nAnswer:"

    # Setting up a task looks at the first character of the first row's choices.
    assert all(rows[0]["choices"])
    splits = {"test": rows}
    return task(name, splits, lambda doc: doc["prompt"], lambda doc: doc["choices"], lambda doc: doc["target"], delimiter, 0)


def task(name, splits, text, choice, target, delimiter, shots):
    config = {
        "task": name,
        "output_type": "multiple_choice",
        "custom_dataset": lambda **_: {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()},
        "test_split": "test",
        "doc_to_text": text,
        "doc_to_choice": choice,
        "doc_to_target": target,
        "target_delimiter": delimiter,
        "num_fewshot": shots,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")],
    }
    if "train" in splits:
        config |= {"fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    return config


class Cuts(logging.Handler):
    """Counts the warnings about requests that were cut."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def emit(self, record):
        self.count += "Truncating" in record.getMessage()


def run(directory, tasks, **settings):
    model = HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=1, **settings)
    done = {}
    for config in tasks:
        cuts = Cuts()
        logging.getLogger("lm_eval.models.huggingface").addHandler(cuts)
        found = lm_eval.simple_evaluate(model=model, tasks=[config], log_samples=True)
        logging.getLogger("lm_eval.models.huggingface").removeHandler(cuts)
        name = config["task"]
        measured = {key.split(",")[0]: value for key, value in found["results"][name].items() if "," in key}
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        done[name] = {
            "delimiter": config["target_delimiter"],
            "shots": config["num_fewshot"],
            "acc": measured["acc"],
            "acc_stderr": measured["acc_stderr"],
            "acc_norm": measured["acc_norm"],
            "acc_norm_stderr": measured["acc_norm_stderr"],
            "cut": cuts.count,
            "questions": [question(sample) for sample in samples],
        }
        print(directory, name, {key: value for key, value in done[name].items() if key != "questions"}, flush=True)
    return done


def question(sample):
    [prompt] = {prompt for prompt, _ in sample["arguments"]}
    return {
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "log_likelihoods": [float(response[0][0]) for response in sample["resps"]],
        "acc": sample["acc"],
        "acc_norm": sample["acc_norm"],
    }


def write(path, done):
    versions = {"lm_eval": lm_eval.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"versions": versions, **done}, indent=1)
    path.write_text(text + "\n")


def without_bos(directory):
    """A model whose tokenizer adds no token of its own."""
    golden = ROOT / "tests/golden"
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden / "families/qwen3" / name, directory)
    shutil.copy(golden / "smollm2_tokenizer.json", directory / "tokenizer.json")
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def results():
    """The file that the harness writes, less what it says of the machine."""
    model = HFLM(pretrained=str(ROOT / "tests/models/medi-tiny"), dtype="float32", device="cpu", batch_size=1)
    with tempfile.TemporaryDirectory() as directory:
        tracker = EvaluationTracker(output_path=directory)
        tasks = [choices("spaced", " "), pubmedqa(3, 5)]
        found = lm_eval.simple_evaluate(model=model, tasks=tasks, evaluation_tracker=tracker)
        tracker.save_results_aggregated(results=found, samples=None)
        [path] = Path(directory).rglob("results_*.json")
        written = json.loads(path.read_text())
    kept = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "config", "transformers_version", "lm_eval_version",
            "model_source", "model_name", "model_name_sanitized", "task_hashes")
    written = {key: value for key, value in written.items() if key in kept}
    written["config"]["model"] = Path(written["config"]["model"]).name
    for config in written["configs"].values():
        # Functions, with where they are.
        for key in ("custom_dataset", "doc_to_text", "doc_to_choice", "doc_to_target"):
            config.pop(key, None)
    (ROOT / "tests/golden/eval/results.json").write_text(json.dumps(written, indent=1) + "\n")


if "--results" in sys.argv:
    results()
elif len(sys.argv) > 2:
    limit = int(sys.argv[3]) if len(sys.argv) > 3 else None
    write(Path(sys.argv[2]), run(Path(sys.argv[1]), [pubmedqa(0, limit), pubmedqa(3, limit)]))
else:
    hard = [choices("spaced", " "), choices("joined", "")]
    out = ROOT / "tests/golden/eval"
    medi_tiny = ROOT / "tests/models/medi-tiny"
    write(out / "medi-tiny.json", run(medi_tiny, [*hard, pubmedqa(0, None), pubmedqa(3, 20)]))
    write(out / "medi-tiny-without-bos.json", run(medi_tiny, [*hard, pubmedqa(0, 10)], add_bos_token=False))
    with tempfile.TemporaryDirectory() as directory:
        without_bos(Path(directory))
        # The last choice of its second row is all in the prompt's last token: no token of it is left to score.
        write(out / "tokenizer-without-bos.json", run(directory, [*hard, pubmedqa(0, 10), pubmedqa(3, 10)]))
