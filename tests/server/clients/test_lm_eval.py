"""lm-eval's local-completions, as docs/server.md sets it up: its scores are those of the model in transformers."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from helpers.servers import serving
from helpers.small_tokenizers import letter_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("lm_eval", "tenacity", "aiohttp")),
        reason="lm-eval is not installed with its extra `api`",
    ),
]
CHOICE_TASK = """\
task: chosen
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/chosen.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN_TASK = """\
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/written.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
generation_kwargs: {{until: ["{stop}"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""
QUESTIONS = ["The river", "A hill of", "Rain on", "Snow and", "The sea is", "One more"]
CHOICES = ["blue", "a long way off", "wet", "nothing at all"]
STOP = "~~"


def ids(text):
    return letter_tokenizer()(text)["input_ids"]


def likelihood(model, question, choice):
    """Return the sum of a choice's log-probabilities after a question."""
    tokens = ids(f"{question} {choice}")
    begin = len(ids(question))
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return sum(float(logprobs[place - 1, tokens[place]]) for place in range(begin, len(tokens)))


def written(model, question):
    """Return what the model goes on with."""
    prompt = torch.tensor([ids(question)])
    new = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False)[0, prompt.shape[1] :]
    return letter_tokenizer().decode(new)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def evaluate(client, folder):
    """Run lm-eval on the tasks of a folder; return its results, and the samples of each task."""
    arguments = {
        "model": "tiny",
        "base_url": f"{client.base_url}/v1/completions",
        "tokenizer": str(folder / "tokenizer"),
        "max_length": 4096,
        "num_concurrent": 4,
    }
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--tasks", "chosen,written"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    command += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    samples = {}
    for task in ("chosen", "written"):
        (lines,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        records = sorted(map(json.loads, lines.read_text().splitlines()), key=lambda record: record["doc_id"])
        samples[task] = records
    return json.loads(results.read_text())["results"], samples


def test_scores_are_those_of_the_model(small, tmp_path):
    sums = [[likelihood(small, question, choice) for choice in CHOICES] for question in QUESTIONS]
    best = [row.index(max(row)) for row in sums]
    longs = [[value / len(choice) for value, choice in zip(row, CHOICES, strict=True)] for row in sums]
    best_of_length = [row.index(max(row)) for row in longs]
    texts = [written(small, question) for question in QUESTIONS]
    golds = [(best[0] + 1) % len(CHOICES), *best[1:]]  # the model has one wrong
    questions = [{"question": question, "choices": CHOICES} for question in QUESTIONS]
    write_lines(tmp_path / "chosen.jsonl", [{**one, "gold": gold} for one, gold in zip(questions, golds, strict=True)])
    wanted = [text if place % 3 else "not that" for place, text in enumerate(texts)]
    write_lines(
        tmp_path / "written.jsonl",
        [{"question": question, "gold": gold} for question, gold in zip(QUESTIONS, wanted, strict=True)],
    )
    (tmp_path / "chosen.yaml").write_text(CHOICE_TASK.format(folder=tmp_path))
    (tmp_path / "written.yaml").write_text(WRITTEN_TASK.format(folder=tmp_path, stop=STOP))
    tokenizer = letter_tokenizer(eos_token="}")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with serving(small) as client:
        results, samples = evaluate(client, tmp_path)
    for record, row in zip(samples["chosen"], sums, strict=True):
        found = [float(response[0][0]) for response in record["resps"]]
        assert found == pytest.approx(row, abs=1e-4)
    accuracy = sum(gold == right for gold, right in zip(golds, best, strict=True)) / len(golds)
    of_length = sum(gold == right for gold, right in zip(golds, best_of_length, strict=True)) / len(golds)
    assert results["chosen"]["acc,none"] == pytest.approx(accuracy)
    assert results["chosen"]["acc_norm,none"] == pytest.approx(of_length)
    assert [record["resps"][0][0] for record in samples["written"]] == texts
    assert results["written"]["exact_match,none"] == pytest.approx(4 / 6)
