"""Measure decoding with a predictor against decoding without, in turns, on the CPU.

Capped: fresh processes in turns, each whole in a memory cgroup of its own, budget "auto". Residencies: both models in
one process, generating in turns, so that whatever else the machine does falls on both. Outputs must be equal.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from bench.cgroup import drop_page_cache, run_process
from bench.engines import ModelSize, plain_bandwidth
from bench.rounds import spread
from moeflow.checkpoint.headers import open_checkpoint
from moeflow.demo.model import default_demo_path
from moeflow.memory_size import parse_memory

WANTED_GAIN, WANTED_FLOOR, WANTED_PREDICTION = 1.25, 0.97, 0.05
PROMPTS = (
    "Explain how a bicycle works.",
    "Write a short story about a lighthouse keeper.",
    "What is the difference between a list and a tuple in Python?",
)


def work(job: dict) -> dict:
    """Generate in turns with each of the job's predictors in this process; return the measurements of each turn."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    import moeflow

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    models = {}
    for name in job["predictors"]:
        model = moeflow.load_moe(job["model"], expert_memory=job["budget"], device="cpu", predictor=name)
        model.generation_config.eos_token_id = None
        models[str(name)] = model
    turns, outputs = {name: [] for name in models}, {}
    begin = time.perf_counter()
    for turn in range(job["turns"] + 1):  # the first one warms up
        text = PROMPTS[turn % len(PROMPTS)]
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]
        for name, model in list(models.items())[:: 1 if turn % 2 else -1]:
            measured, tokens = _generate(model, ids, job["tokens"], torch)
            assert outputs.setdefault((turn % len(PROMPTS)), tokens) == tokens, f"{name} changes the output"
            if turn:
                turns[name].append(measured)
        if time.perf_counter() - begin > job["seconds"]:
            break
    return {"turns": turns, "outputs": list(outputs.values())}


def _generate(model, ids, num_tokens, torch) -> tuple[dict, list[int]]:
    marks, tokens, runtime = [], [], model.moeflow

    class Streamer:
        def put(self, value):
            if len(marks):
                tokens.append(int(value.reshape(-1)[0]))
            if len(marks) == 1:
                runtime.reset_stats()
            marks.append(time.perf_counter())

        def end(self):
            pass

    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=Streamer(),
    )
    stats = runtime.stats()
    decode, seconds = stats["decode"], marks[-1] - marks[1]
    return {
        "tokens_per_s": (num_tokens - 1) / seconds,
        "ttft_s": marks[1] - marks[0],
        "hit_rate": decode["hit_rate"],
        "stall_share": decode["stall_s"] / seconds,
        "compute_share": decode["compute_s"] / seconds,
        "prediction_share": decode["predict_s"] / seconds,
        "read_bytes_per_token": decode["bytes_from_disk"] / (num_tokens - 1),
        "slots": stats["slots"],
        "prediction": stats["prediction"],
    }, tokens


def run_job(args, predictors: list, budget: str, turns: int, limit_bytes: int | None) -> dict:
    """Run one job in a process of its own."""
    drop_page_cache(open_checkpoint(args.model).files)
    job = {
        "model": str(args.model),
        "predictors": predictors,
        "budget": budget,
        "tokens": args.tokens,
        "turns": turns,
        "seconds": args.seconds,
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    ended = run_process(command, limit_bytes=limit_bytes, timeout_s=3 * args.seconds + 300)
    answer = next((line for line in reversed(ended.stdout.splitlines()) if line.startswith("{")), None)
    if ended.returncode or answer is None:
        why = "killed at the cap" if ended.oom_killed else (ended.stderr.strip().splitlines() or ["failed"])[-1]
        raise SystemExit(f"bench: {budget}, {predictors}: {why}")
    return json.loads(answer)


def capped(args) -> dict:
    """Compare under the cap: one process after another, in turns."""
    limit = parse_memory(args.cap, name="--cap", whole_bytes=0)
    names = [None, args.predictor]
    turns: dict[str, list] = {str(name): [] for name in names}
    ratios, outputs = [], None
    for number in range(args.rounds):
        rates = {}
        for name in names if number % 2 else names[::-1]:
            say(f"capped at {args.cap}, round {number + 1} of {args.rounds}, predictor {name}")
            found = run_job(args, [name], "auto", args.repeats, limit)
            outputs = outputs or found["outputs"]
            same = all(one == other for one, other in zip(found["outputs"], outputs, strict=False))
            assert same, f"predictor {name} changes the output"
            turns[str(name)] += found["turns"][str(name)]
            rates[name] = statistics.median(turn["tokens_per_s"] for turn in found["turns"][str(name)])
            say(f"  {rates[name]:.2f} tok/s")
        ratios.append(rates[args.predictor] / rates[None])
    return {"name": f"auto, whole process capped at {args.cap}", **summary(turns, args.predictor), "ratios": ratios}


def resident(args, budget: str) -> dict:
    """Compare at one residency: both models in one process, in turns."""
    say(f"residency {budget}")
    turns = run_job(args, [None, args.predictor], budget, args.rounds * args.repeats, None)["turns"]
    pairs = zip(turns[args.predictor], turns["None"], strict=True)
    ratios = [one["tokens_per_s"] / other["tokens_per_s"] for one, other in pairs]
    say(f"  ratio {statistics.median(ratios):.3f}")
    return {"name": budget.replace("%", " %"), **summary(turns, args.predictor), "ratios": ratios}


def summary(turns: dict, predictor: str) -> dict:
    """Put the turns of both sides into one row."""
    row = {}
    for side, name in (("without", "None"), ("with", predictor)):
        keys = [key for key in turns[name][0] if key != "prediction"]
        row[side] = {key: spread([turn[key] for turn in turns[name]]) for key in keys}
    row["prediction"] = turns[predictor][-1]["prediction"]
    return row


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def print_rows(rows: list[dict]) -> None:
    """Print the table."""
    print(
        f"{'experts in memory':34} {'tok/s without':>14} {'with':>7} {'ratio (range)':>22} {'hit rate':>14} "
        f"{'stall share':>14} {'predicting':>11} {'MB a token':>13}  switch"
    )
    for row in rows:
        one, two = row["without"], row["with"]
        ratio = spread(row["ratios"])

        def both(key, scale=1, digits=2, one=one, two=two):
            return f"{one[key]['median'] * scale:.{digits}f} > {two[key]['median'] * scale:.{digits}f}"

        prediction = row["prediction"]
        print(
            f"{row['name']:34} {one['tokens_per_s']['median']:14.2f} {two['tokens_per_s']['median']:7.2f} "
            f"{ratio['median']:8.3f} ({ratio['min']:.3f} to {ratio['max']:.3f}) {both('hit_rate'):>14} "
            f"{both('stall_share'):>14} {two['prediction_share']['median']:11.3f} "
            f"{both('read_bytes_per_token', 1e-6, 0):>13}  "
            f"{'on' if prediction['on'] else 'off'}: {prediction['reason']}"
        )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, or one worker of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=default_demo_path(), help="checkpoint folder (the demo model)")
    parser.add_argument("--predictor", default="auto", help="as load_moe takes it (auto)")
    parser.add_argument("--cap", metavar="SIZE", help='also compare under this memory limit, such as "1000MB"')
    parser.add_argument("--residencies", default="12.5,25,50,75,100", help="percent of the experts; empty for none")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode (64)")
    parser.add_argument("--repeats", type=int, default=2, help="generations a round (2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    parser.add_argument("--seconds", type=float, default=120, help="no further turn of a process after this long (120)")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return 0
    checkpoint = open_checkpoint(args.model)
    size = ModelSize.of(checkpoint)
    disk, mode = plain_bandwidth(checkpoint.files, size.expert_bytes)
    rows = [capped(args)] if args.cap else []
    rows += [resident(args, f"{percent.strip()}%") for percent in args.residencies.split(",") if percent.strip()]
    if not args.json:
        print(f"{args.model.name}: {size.num_experts} experts of {size.expert_bytes / 1e6:.2f} MB, {size.num_layers} ")
        print(f"layers; disk {disk / 1e9:.2f} GB/s ({mode}); {args.tokens} tokens, {args.rounds} rounds")
        print_rows(rows)
        print(f"wanted: {WANTED_GAIN} capped, {WANTED_FLOOR} anywhere, prediction under {WANTED_PREDICTION} of a step")
    print(json.dumps({"disk_bytes_per_s": disk, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
