"""How fast demand-only replays run: the compiled loop on a whole trace, the Python loop on its first tokens.

    python scripts/bench_replay.py TRACE [--residency 25] [--policy lru,lfu,lfru,belady] [--repeats 5]

Both loops must agree on the first tokens before anything is timed. One thread; accesses a second are hits and misses.
"""

import argparse
import json
import statistics
import sys
import time

import numpy as np

from moeflow.replay import demand as compiled
from moeflow.replay.demand_loop import replay_loop
from moeflow.trace.trace import RoutingTrace

FIRST = 500  # tokens that the Python loop replays
LIMIT_S = 20


def main(argv=None) -> None:
    """Print the table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--residency", type=float, default=25)
    parser.add_argument("--policy", default="lru,lfu,lfru,belady")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    trace = RoutingTrace.open(arguments.trace)
    experts, starts = compiled.sequence_rows(trace, "all")
    num_slots = compiled.slots_of(arguments.residency, trace.experts_per_layer, trace.top_k)
    loop = compiled._compiled_loop()
    if loop is None:
        sys.exit("moeflow's compiled replay is not built here: there is nothing to measure.")
    first = np.sort(experts[:FIRST].astype(np.uint16))
    options = {"warm": False, "num_fixed": num_slots - trace.top_k - 1, "seed": 0}

    print(f"{len(experts):,} tokens x {trace.num_layers} layers x {trace.top_k} experts, {num_slots} slots\n")
    print(f"| policy | hit rate | compiled s (range), limit {LIMIT_S} | accesses/s | Python accesses/s |")
    print("|---|---|---|---|---|")
    figures = {}
    for policy in arguments.policy.split(","):
        short = (first, trace.num_experts, np.array([0, len(first)]), num_slots, policy)
        begin = time.perf_counter()
        expected = replay_loop(*short, **options)
        python_s = time.perf_counter() - begin
        assert np.array_equal(loop(*short, **options), expected), f"the two loops differ for {policy}"
        seconds = []
        for _ in range(arguments.repeats):
            begin = time.perf_counter()
            result = compiled.replay(experts, trace.num_experts, starts, num_slots, policy)
            seconds.append(time.perf_counter() - begin)
        median = statistics.median(seconds)
        rates = result.accesses / median, expected[1].sum() / python_s
        span = f"{median:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        print(f"| {policy} | {result.hit_rate:.4f} | {span} | {rates[0]:,.0f} | {rates[1]:,.0f} |")
        figures[policy] = {"hit_rate": result.hit_rate, "seconds": median, "accesses_per_s": rates[0]}
    print(json.dumps({"tokens": len(experts), "slots": num_slots, "policies": figures}))


if __name__ == "__main__":
    main()
