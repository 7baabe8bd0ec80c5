"""Measure the regrouping of tokens: active experts on real routing, and tokens a second on a model.

    python scripts/bench_scheduler.py [--data ../shared/data] [--trials 100]
    python scripts/bench_scheduler.py --live MODEL [--new-tokens 64]

Batches are made of gpt-oss-20b's decode steps: sequences of at least 100 tokens that are no duplicates, each at a
random step of its own. Given the true routes: groups by arrival, at random, by length of the sequence, by ExpertFlow's
K-medoids, by the search, the best split there is (2 x 16, proven), and the eigenvalue bound below every split. Given
likely routes, on batches of every other sequence: by what the sequences' last tokens took alone, by the tokens that are
fed as well with a memory that has seen nothing but these sequences, and with one that has seen the other half. Plans of
2 x 64 tokens with 32 layers of 64 experts are timed on random routes.

With --live the first 32 prompts of Spec-Bench run on a model at 25 % residency: by `generate` prompt by prompt (the
first --generate of them), and by the engine: all in one pass, and in passes of 16 that decode, by arrival and
regrouped, whose steps run in turn, each on a model of its own, so that both meet the same machine. Each step's true
routes give the saving of the best order. Then 32 copies of one prompt with all experts resident, where nothing can be
gained: steps of both engines in turn. The last line is one JSON object.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.live_regrouping import bench_live, bench_nothing_to_gain
from moeflow.engine.regrouping.likely_routes import LikelyRoutes
from moeflow.engine.regrouping.oracles.best_split import best_split
from moeflow.engine.regrouping.oracles.bound import regroup_bound
from moeflow.engine.regrouping.oracles.medoids import medoid_groups
from moeflow.engine.regrouping.search import active_pairs, arrival_groups, regroup
from moeflow.predictors.odds import multi_hot
from moeflow.trace.convert import convert_trace
from moeflow.trace.trace import RoutingTrace

SHAPES = ((2, 16), (4, 16), (2, 64))
WANTED = {(2, 16): 0.13, (4, 16): 0.18, (2, 64): 0.075}
_PROOF_STEPS = 100_000_000  # of a best split's search, some seconds


def main(argv=None) -> None:
    """Print the tables and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MOEFLOW_TEST_DATA", default)))
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--live", metavar="MODEL", help="folder of a model, such as the demo model")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", help="of the live model; in bfloat16 near ties may differ")
    parser.add_argument("--generate", type=int, default=4, help="prompts that generate runs one by one")
    arguments = parser.parse_args(argv)
    if arguments.live:
        print(json.dumps({**bench_live(arguments), "nothing_to_gain": bench_nothing_to_gain(arguments)}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        convert_trace(arguments.data / "gpt_oss_20b", f"{scratch}/trace")
        steps = Steps(RoutingTrace.open(f"{scratch}/trace"))
        found = {f"{groups} x {size}": bench_shape(steps, groups, size, arguments.trials) for groups, size in SHAPES}
    found["plan_ms"] = bench_plan()
    print(json.dumps(found))


class Steps:
    """Decode steps of a trace, and a memory of every other sequence."""

    def __init__(self, trace):
        self.trace, self.facts = trace, trace.sequence_facts
        self.rows = [slice(rows.start, rows.stop) for rows in trace.sequences()]
        long = [rows.stop - rows.start >= 100 for rows in self.rows]
        self.eligible = [i for i, fact in enumerate(self.facts) if long[i] and not fact["duplicate"]]
        self.memory = LikelyRoutes(trace.num_layers, trace.num_experts, trace.top_k)
        for number in range(0, len(self.rows), 2):
            self.feed(self.memory, number, self.rows[number].stop)
            self.memory.forget(number)

    def draw(self, rng, count: int, eligible: list[int]) -> list[tuple[int, int]]:
        """Choose (sequence, step) of so many different sequences."""
        chosen = [eligible[i] for i in rng.choice(len(eligible), count, replace=False)]
        return [(number, int(rng.integers(self.rows[number].start + 1, self.rows[number].stop))) for number in chosen]

    def routes(self, rows) -> np.ndarray:
        """Return [rows, L, E] bool."""
        return multi_hot(self.trace.experts[rows], self.trace.num_experts) > 0

    def feed(self, memory, number: int, stop: int) -> None:
        """Let a memory see a sequence up to a step."""
        rows = slice(self.rows[number].start, stop)
        memory.observe(number, self.trace.token_ids[rows].tolist(), self.trace.experts[rows])

    def likely(self, memory, drawn, *, tokens: bool = True) -> np.ndarray:
        """Return [tokens, L, E] bool: likely routes of a memory that has seen all drawn sequences up to their steps."""
        memory = copy.deepcopy(memory)
        for number, step in drawn:
            self.feed(memory, number, step)
        fed = [int(self.trace.token_ids[step]) if tokens else None for _, step in drawn]
        return memory.likely([number for number, _ in drawn], fed)


def bench_shape(steps: Steps, num_groups: int, size: int, trials: int) -> dict:
    """Active experts a layer and group by every order."""
    rng = np.random.default_rng(0)
    seconds, proven, totals = [], 0, {}
    for _ in range(trials):
        drawn = steps.draw(rng, num_groups * size, steps.eligible)
        true = steps.routes([step for _, step in drawn])
        arrival = arrival_groups(len(true), num_groups)
        by_length = np.empty_like(arrival)
        lengths = [steps.rows[number].stop - steps.rows[number].start for number, _ in drawn]
        by_length[np.argsort(lengths, kind="stable")] = arrival
        begin = time.perf_counter()
        searched = regroup(true, num_groups)
        seconds.append(time.perf_counter() - begin)
        orders = {
            "arrival": arrival,
            "random": rng.permutation(arrival),
            "by length": by_length,
            "K-medoids": medoid_groups(true, num_groups),
            "search": searched,
        }
        if (num_groups, size) == (2, 16):
            orders["best split"], is_best = best_split(true, num_steps=_PROOF_STEPS)
            proven += is_best
        for name, groups in orders.items():
            totals[name] = totals.get(name, 0) + active_pairs(true, groups)
        totals["bound"] = totals.get("bound", 0) + regroup_bound(true, num_groups)
    each, milliseconds = trials * num_groups * steps.trace.num_layers, 1e3 * statistics.median(seconds)
    print(f"\n{num_groups} x {size} tokens, {trials} batches, a plan in {milliseconds:.1f} ms (median)")
    gains = print_gains(totals, each)
    print(f"  wanted {WANTED[num_groups, size]:.1%} fewer with true routes")
    if proven:
        print(f"  the best split is proven to be the best in {proven} of {trials} batches")
    likely = bench_likely(steps, num_groups, size, trials)
    experts = {name: total / each for name, total in totals.items()}
    return {"experts": experts, "gain": gains, "likely": likely, "plan_ms": milliseconds, "proven": proven}


def bench_likely(steps: Steps, num_groups: int, size: int, trials: int) -> dict:
    """The same of groups chosen by likely routes, on the half of the sequences that the memory has not seen."""
    rng, totals = np.random.default_rng(1), {}
    empty = LikelyRoutes(steps.trace.num_layers, steps.trace.num_experts, steps.trace.top_k)
    for _ in range(trials):
        drawn = steps.draw(rng, num_groups * size, [number for number in steps.eligible if number % 2])
        true = steps.routes([step for _, step in drawn])
        cold, warm = steps.likely(empty, drawn), steps.likely(steps.memory, drawn)
        orders = {
            "arrival": arrival_groups(len(true), num_groups),
            "true routes": regroup(true, num_groups),
            "last tokens' routes": regroup(steps.likely(empty, drawn, tokens=False), num_groups),
            "likely, new memory": regroup(cold, num_groups),
            "likely, memory": regroup(warm, num_groups),
            "likely, memory, K-medoids": medoid_groups(warm, num_groups),
        }
        for name, groups in orders.items():
            totals[name] = totals.get(name, 0) + active_pairs(true, groups)
    print("  of every other sequence")
    gains = print_gains(totals, trials * num_groups * steps.trace.num_layers)
    shares = {name: gain / gains["true routes"] for name, gain in gains.items() if name.startswith("likely")}
    print("  of the gain with true routes: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    print("  wanted 50%")
    return {"gain": gains, "share_of_true": shares}


def print_gains(totals: dict, each: int) -> dict:
    """Print a line for each order; return how much fewer than by arrival."""
    gains = {name: 1 - total / totals["arrival"] for name, total in totals.items()}
    for name, total in totals.items():
        print(f"  {name:28s} {total / each:6.2f} experts a layer and group   {gains[name]:6.1%} fewer")
    return gains


def bench_plan() -> float:
    """Milliseconds of a plan for 2 x 64 tokens, 32 layers, 64 experts."""
    routes = np.zeros((128, 32, 64), bool)
    np.put_along_axis(routes, np.random.default_rng(0).random(routes.shape).argsort(axis=2)[:, :, :4], True, 2)
    seconds = []
    for seed in range(20):
        begin = time.perf_counter()
        regroup(routes, 2, seed=seed)
        seconds.append(time.perf_counter() - begin)
    print(f"\na plan for 2 x 64 tokens, 32 x 64 experts: {1e3 * statistics.median(seconds):.1f} ms (10 wanted)")
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    main()
