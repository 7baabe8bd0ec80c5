"""Measure decoding with a predictor against decoding without, and native steps against Python's, in turns, on the CPU.

Capped: fresh processes in turns, each whole in a memory cgroup of its own, budget "auto". Residencies: all models in
one process, generating in turns, so that whatever else the machine does falls on all. Outputs with and without a
predictor must be equal.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from bench.cgroup import drop_page_cache, run_process
from bench.device import add_device
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
    """Generate in turns with each of the job's sides in this process; return the measurements of each turn."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    import moeflow

    logging.disable_progress_bar()
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    models = {}
    for predictor, step in job["sides"]:
        options = {"expert_memory": job["budget"], "device": job["device"], "predictor": predictor, "step": step}
        model = moeflow.load_moe(job["model"], **options)
        model.generation_config.eos_token_id = None
        models[side(predictor, step)] = model
    turns, outputs = {name: [] for name in models}, {}
    begin = time.perf_counter()
    for turn in range(job["turns"] + 1):  # the first one warms up
        text = PROMPTS[turn % len(PROMPTS)]
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]
        ids = ids.to(job["device"])
        for name in in_turn(list(models), turn):
            model = models[name]
            measured, tokens = _generate(model, ids, job["tokens"], torch)
            same = outputs.setdefault(f"{turn % len(PROMPTS)} {name.split()[1]}", tokens) == tokens
            assert same, f"{name} changes the output"
            if turn:
                turns[name].append(measured)
        if time.perf_counter() - begin > job["seconds"]:
            break
    return {"turns": turns, "outputs": outputs}


def in_turn(names: list[str], turn: int) -> list[str]:
    """Return the order of one turn: over as many turns as there are names, two or four, each follows each other once.

    A disk may be slow for a while after many reads, so that what ran before a side counts (Williams, 1949).
    """
    count = len(names)
    steps = [(-place if place % 2 else place) // 2 % count for place in range(count)]
    return [names[(step + turn) % count] for step in steps]


def side(predictor: str | None, step: str) -> str:
    """Return the name of one side of a comparison."""
    return f"{predictor} {step}"


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
        "step": stats["step"],
    }, tokens


def run_job(args, sides: list, budget: str, turns: int, limit_bytes: int | None) -> dict:
    """Run one job in a process of its own."""
    drop_page_cache(open_checkpoint(args.model).files)
    job = {
        "model": str(args.model),
        "sides": sides,
        "budget": budget,
        "tokens": args.tokens,
        "turns": turns,
        "seconds": args.seconds,
        "threads": args.threads,
        "device": args.device,
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(job)]
    ended = run_process(command, limit_bytes=limit_bytes, timeout_s=3 * args.seconds + 300)
    answer = next((line for line in reversed(ended.stdout.splitlines()) if line.startswith("{")), None)
    if ended.returncode or answer is None:
        why = "killed at the cap" if ended.oom_killed else (ended.stderr.strip().splitlines() or ["failed"])[-1]
        raise SystemExit(f"bench: {budget}, {sides}: {why}")
    return json.loads(answer)


def capped(args) -> list[dict]:
    """Compare under the cap: one process after another, in turns."""
    limit = parse_memory(args.cap, name="--cap", whole_bytes=0)
    turns: dict[str, list] = {side(*one): [] for one in args.sides}
    rates: dict[str, list] = {name: [] for name in turns}
    outputs: dict[str, list] = {}
    for number in range(args.rounds):
        for predictor, step in args.sides if number % 2 else args.sides[::-1]:
            name = side(predictor, step)
            say(f"capped at {args.cap}, round {number + 1} of {args.rounds}, predictor {predictor}, step {step}")
            found = run_job(args, [(predictor, step)], "auto", args.repeats, limit)
            for key, tokens in found["outputs"].items():
                assert outputs.setdefault(key, tokens) == tokens, f"{name} changes the output"
            turns[name] += found["turns"][name]
            rates[name].append(statistics.median(turn["tokens_per_s"] for turn in found["turns"][name]))
            say(f"  {rates[name][-1]:.2f} tok/s")
    return rows_of(args, f"auto, whole process capped at {args.cap}", turns, rates)


def resident(args, budget: str) -> list[dict]:
    """Compare at one residency: all models in one process, in turns."""
    say(f"residency {budget}")
    turns = run_job(args, args.sides, budget, args.rounds * args.repeats, None)["turns"]
    rates = {name: [turn["tokens_per_s"] for turn in found] for name, found in turns.items()}
    return rows_of(args, budget.replace("%", " %"), turns, rates)


def rows_of(args, name: str, turns: dict, rates: dict) -> list[dict]:
    """Put the turns into one row for each way of running steps; rates are of paired rounds."""
    rows = []
    for step in args.steps:
        with_name, without = side(args.predictor, step), side(None, step)
        row: dict = {"name": name, "steps": step}
        for key, of in (("without", without), ("with", with_name)):
            keys = [key for key in turns[of][0] if key not in ("prediction", "step")]
            row[key] = {key: spread([turn[key] for turn in turns[of]]) for key in keys}
        row["prediction"] = turns[with_name][-1]["prediction"]
        row["step"] = turns[with_name][-1]["step"]
        row["ratios"] = [a / b for a, b in zip(rates[with_name], rates[without], strict=True)]
        first = args.steps[0]
        if step != first:
            row["to"] = first
            for key, predictor in (("ratios_without", None), ("ratios_with", args.predictor)):
                pairs = zip(rates[side(predictor, step)], rates[side(predictor, first)], strict=True)
                row[key] = [a / b for a, b in pairs]
        rows.append(row)
    return rows


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def print_rows(rows: list[dict]) -> None:
    """Print the table, and how much faster native steps are."""
    print(
        f"{'experts in memory':34} {'steps':6} {'tok/s without':>14} {'with':>7} {'ratio (range)':>22} "
        f"{'hit rate':>14} {'stall share':>14} {'predicting':>11} {'MB a token':>13}  switch"
    )
    for row in rows:
        one, two = row["without"], row["with"]

        def both(key, scale=1, digits=2, one=one, two=two):
            return f"{one[key]['median'] * scale:.{digits}f} > {two[key]['median'] * scale:.{digits}f}"

        prediction = row["prediction"]
        print(
            f"{row['name']:34} {row['steps']:6} {one['tokens_per_s']['median']:14.2f} "
            f"{two['tokens_per_s']['median']:7.2f} {_ratio(row['ratios']):>22} {both('hit_rate'):>14} "
            f"{both('stall_share'):>14} {two['prediction_share']['median']:11.3f} "
            f"{both('read_bytes_per_token', 1e-6, 0):>13}  "
            f"{'on' if prediction['on'] else 'off'}: {prediction['reason']}"
        )
    for row in rows:
        if "to" in row:
            print(
                f"{row['name']}: step={row['steps']} ({row['step']['mode']}) to step={row['to']}: "
                f"{_ratio(row['ratios_without'])} without a predictor, {_ratio(row['ratios_with'])} with it"
            )


def _ratio(values: list[float]) -> str:
    ratio = spread(values)
    return f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark, or one worker of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=default_demo_path(), help="checkpoint folder (the demo model)")
    parser.add_argument("--predictor", default="auto", help="as load_moe takes it (auto)")
    parser.add_argument("--steps", default="python,auto", help="ways of running steps, in turns (python,auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads; without it torch's own choice")
    add_device(parser)
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
    args.steps = args.steps.split(",")
    args.sides = [(predictor, step) for step in args.steps for predictor in (None, args.predictor)]
    checkpoint = open_checkpoint(args.model)
    size = ModelSize.of(checkpoint)
    disk, mode = plain_bandwidth(checkpoint.files, size.expert_bytes)
    rows = capped(args) if args.cap else []
    for percent in args.residencies.split(","):
        rows += resident(args, f"{percent.strip()}%") if percent.strip() else []
    if not args.json:
        print(f"{args.model.name}: {size.num_experts} experts of {size.expert_bytes / 1e6:.2f} MB, {size.num_layers} ")
        print(f"layers; disk {disk / 1e9:.2f} GB/s ({mode}); {args.tokens} tokens, {args.rounds} rounds")
        print_rows(rows)
        print(f"wanted: {WANTED_GAIN} capped, {WANTED_FLOOR} anywhere, prediction under {WANTED_PREDICTION} of a step")
    print(json.dumps({"disk_bytes_per_s": disk, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
