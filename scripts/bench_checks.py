"""Measure what the CPU kernels' checks of their arguments cost: seconds a call, times calls a token, of a decode step.

Greedy, one sequence, every expert in memory. Each check is timed on the arguments that the model's own last call gave
it, in a loop of its own; a step's time is the median between two tokens of generate().
"""

import argparse
import json
import statistics
import sys
import timeit
from collections import Counter
from itertools import pairwise
from pathlib import Path

from bench.machine import describe, print_card, software
from bench.token_times import TokenTimes

PROMPT = "The history of the steam engine begins long before the railways. In the first century,"
CHECKS = ("takes_linear", "takes_norm", "takes_layer", "takes_experts", "takes_outputs")
REPEATS, CALLS = 7, 5000  # of the timing of one check; the fastest repeat counts


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the last line of standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="a checkpoint (the demo model)")
    parser.add_argument("--dtype", default="bfloat16", help="of the model (bfloat16)")
    parser.add_argument("--tokens", type=int, metavar="N", default=48, help="decoded (48)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads; without it torch's own choice")
    arguments = parser.parse_args(argv)
    if arguments.tokens < 3:
        parser.error("--tokens must be at least 3")

    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from moeflow import load_moe
    from moeflow.demo.model import default_demo_path
    from moeflow.kernels.cpu.library import instruction_set

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if instruction_set() is None:
        print("no compiled kernels here, so nothing is checked", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = Path(arguments.model) if arguments.model else default_demo_path()
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")["input_ids"]
    card = {"model": str(folder), "dtype": arguments.dtype, **describe("torch", "transformers")}
    print_card({"model": f"{folder}, {arguments.dtype}", "machine": card["cpu"], "software": software(card)})
    model = load_moe(folder, dtype=arguments.dtype, device="cpu", expert_memory="100%", predictor=None, step="python")
    with model.moeflow:
        model.generate(ids, max_new_tokens=2, do_sample=False)  # reads every expert of the prompt
        step_s = median_step(model, ids, arguments.tokens)
        rows = [
            {"check": name, "calls_a_token": calls, "seconds_a_call": seconds, "share": calls * seconds / step_s}
            for name, calls, seconds in checks_of_a_step(model, ids)
        ]
    for row in rows:
        print(f"{row['check']:14} {row['calls_a_token']:4} calls of {1e9 * row['seconds_a_call']:6.0f} ns")
    share = sum(row["share"] for row in rows)
    print(f"{100 * share:.2f} % of a decode step of {1e3 * step_s:.2f} ms")
    print(json.dumps({"card": card, "step_s": step_s, "rows": rows, "share": share}))
    return 0


def median_step(model, ids, num_tokens: int) -> float:
    """Return the seconds between two tokens, the first left out."""
    streamer = TokenTimes()
    model.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, streamer=streamer)
    return statistics.median(after - before for before, after in pairwise(streamer.times[1:]))


def checks_of_a_step(model, ids) -> list[tuple[str, int, float]]:
    """Return each check's name, its calls in one decode step and the seconds of one of them."""
    import torch

    from moeflow.kernels.cpu import checks

    calls: Counter[str] = Counter()
    last: dict[str, tuple] = {}
    plain = {name: getattr(checks, name) for name in CHECKS}

    def counted(name: str):
        def check(*arguments: object) -> bool:
            calls[name] += 1
            last[name] = arguments
            return plain[name](*arguments)

        return check

    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        for name in CHECKS:
            setattr(checks, name, counted(name))
        try:
            model(ids[:, -1:], past_key_values=cache, use_cache=True)
        finally:
            for name in CHECKS:
                setattr(checks, name, plain[name])
    found = []
    for name, arguments in last.items():
        check = plain[name]
        times = timeit.repeat(lambda check=check, given=arguments: check(*given), number=CALLS, repeat=REPEATS)
        found.append((name, calls[name], min(times) / CALLS))
    return found


if __name__ == "__main__":
    sys.exit(main())
