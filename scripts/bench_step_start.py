"""Measure how decoding starts: the capture of a step's program, its reading from the disk, and the first tokens.

Each start is a process of its own; starts by Python's steps, with a capture, and with the program on disk take turns.
Times are medians over the rounds, with the least and the most.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT = "The history of the steam engine begins long before the railways. In the first century,"
WAYS = ("python", "capture", "disk")
PARTS = {
    "load_s": "loading",
    "prepare_s": "preparing the program",
    "first_token_s": "first token",
    "second_token_s": "second token",
}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder; without it the demo model")
    parser.add_argument("--rounds", type=int, default=5, help="starts of each kind (5)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        print(json.dumps(start(arguments.model, arguments.worker, arguments.threads)))
        return 0

    from moeflow.demo.model import default_demo_path

    folder = Path(arguments.model) if arguments.model else default_demo_path()
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as kept:
        run_worker(folder, "capture", arguments.threads, kept)  # writes the program, and warms the page cache
        for turn in range(arguments.rounds):
            print(f"round {turn + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            for way in WAYS:
                with tempfile.TemporaryDirectory() as empty:
                    cache = kept if way == "disk" else empty
                    found[way].append(run_worker(folder, way, arguments.threads, cache))
    print(f"{folder.name}, {arguments.threads} threads, {arguments.rounds} rounds; seconds")
    for part, text in PARTS.items():
        cells = []
        for way in WAYS:
            values = [one[part] for one in found[way]]
            cells.append(f"{way} {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"{text:22} " + ", ".join(cells))
    native = {way: sorted({one["mode"] for one in found[way]}) for way in WAYS}
    print(json.dumps({"model": folder.name, "threads": arguments.threads, "starts": found, "modes": native}))
    return 0


def run_worker(folder: Path, way: str, threads: int, cache: str) -> dict:
    """Start a process and return what it measured."""
    environment = dict(os.environ, MOEFLOW_CACHE=cache, OMP_NUM_THREADS=str(threads))
    root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--model", str(folder), "--worker", way, "--threads", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def start(folder: str, way: str, threads: int) -> dict:
    """Load a model, prepare its step and generate three tokens, as `moeflow chat` does."""
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from bench.token_times import TokenTimes
    from moeflow import load_moe

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    begin = time.perf_counter()
    model = load_moe(folder, device="cpu", expert_memory="100%", step="python" if way == "python" else "auto")
    loaded = time.perf_counter()
    if model.moeflow.step is not None:
        model.moeflow.step.prepare()
    prepared = time.perf_counter()
    clock = TokenTimes()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0,
        streamer=clock,
    )  # fmt: skip
    first, second = clock.times[1:3]
    return {
        "load_s": loaded - begin,
        "prepare_s": prepared - loaded,
        "first_token_s": first - prepared,
        "second_token_s": second - first,
        "mode": model.moeflow.stats()["step"]["mode"],
    }


if __name__ == "__main__":
    raise SystemExit(main())
