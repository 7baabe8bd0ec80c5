"""What regrouping tokens is worth on real routing: active experts a layer and group, and the time it takes.

    python scripts/bench_scheduler.py [--data ../shared/data] [--trials 100] [--live MODEL]

Batches are made of gpt-oss-20b's decode steps: sequences of at least 100 tokens that are no duplicates, each at a
random step of its own. Groups by arrival, at random, by length of the sequence, by ExpertFlow's K-medoids, and by the
search: given the true routes, and given a guess of them from the sequence's own last 30 tokens (the six experts of each
layer with the most decayed uses). The bound says what no split can be below. Plans of 2 x 64 tokens with 32 layers of
64 experts are timed on random routes.

With --live the first 32 prompts of Spec-Bench run on a model at 25 % residency, `--new-tokens` each: by `generate`,
prompt by prompt (the first --generate of them), and by the engine: all in one pass, and in passes of 16 that decode,
grouped by arrival and by the scheduler. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moeflow.medoids import medoid_groups
from moeflow.regroup import active_pairs, arrival_groups, regroup
from moeflow.regroup_bound import regroup_bound
from moeflow.routing import open_trace
from moeflow.trace_sources import convert_trace

SHAPES = ((2, 16), (4, 16), (2, 64))
WANTED = {(2, 16): 0.13, (4, 16): 0.18, (2, 64): 0.075}
_RECENT, _DECAY, _GUESSED = 30, 0.9, 6


def main(argv=None) -> None:
    """Print the table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MOEFLOW_TEST_DATA", default)))
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--live", metavar="MODEL", help="folder of a model, such as the demo model")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32", help="of the live model; in bfloat16 near ties may differ")
    parser.add_argument("--generate", type=int, default=4, help="prompts that generate runs one by one")
    arguments = parser.parse_args(argv)
    if arguments.live:
        print(json.dumps(bench_live(arguments)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        convert_trace(arguments.data / "gpt_oss_20b", f"{scratch}/trace")
        trace = open_trace(f"{scratch}/trace")
        found = {f"{groups} x {size}": bench_shape(trace, groups, size, arguments.trials) for groups, size in SHAPES}
    found["plan_ms"] = bench_plan()
    print(json.dumps(found))


def bench_shape(trace, num_groups: int, size: int, trials: int) -> dict:
    """Active experts a layer and group by every order."""
    facts = trace.sequence_facts
    sequences = [
        rows
        for rows, fact in zip(trace.sequences(), facts, strict=True)
        if rows.stop - rows.start >= 100 and not fact["duplicate"]
    ]
    rng = np.random.default_rng(0)
    totals, seconds = {}, []
    for _ in range(trials):
        chosen = [sequences[i] for i in rng.choice(len(sequences), num_groups * size, replace=False)]
        steps = [int(rng.integers(rows.start + 1, rows.stop)) for rows in chosen]
        true = _routes(trace.experts[steps], trace.num_experts)
        guess = np.stack([_guess(trace, rows, step) for rows, step in zip(chosen, steps, strict=True)])
        arrival = arrival_groups(len(true), num_groups)
        by_length = np.empty_like(arrival)
        by_length[np.argsort([rows.stop - rows.start for rows in chosen], kind="stable")] = arrival
        begin = time.perf_counter()
        searched = regroup(true, num_groups)
        seconds.append(time.perf_counter() - begin)
        orders = {
            "arrival": arrival,
            "random": rng.permutation(arrival),
            "by length": by_length,
            "K-medoids": medoid_groups(true, num_groups),
            "search": searched,
            "K-medoids, guessed routes": medoid_groups(guess, num_groups),
            "search, guessed routes": regroup(guess, num_groups),
        }
        for name, groups in orders.items():
            totals[name] = totals.get(name, 0) + active_pairs(true, groups)
        totals["bound"] = totals.get("bound", 0) + regroup_bound(true, num_groups)
    each = trials * num_groups * trace.num_layers
    milliseconds = 1e3 * statistics.median(seconds)
    print(f"\n{num_groups} x {size} tokens, {trials} batches, a plan in {milliseconds:.1f} ms (median)")
    for name, total in totals.items():
        print(
            f"  {name:28s} {total / each:6.2f} experts a layer and group   {1 - total / totals['arrival']:6.1%} fewer"
        )
    print(f"  wanted {WANTED[num_groups, size]:.1%} fewer with true routes")
    gains = {name: 1 - total / totals["arrival"] for name, total in totals.items()}
    return {"experts": {name: total / each for name, total in totals.items()}, "gain": gains, "plan_ms": milliseconds}


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


def bench_live(arguments) -> dict:
    """Tokens a second and active experts a step, by who runs together."""
    import torch
    from transformers import AutoTokenizer

    from moeflow import load_moe
    from moeflow.engine import Engine
    from moeflow.sampling import SamplingParams

    tokenizer = AutoTokenizer.from_pretrained(arguments.live)
    lines = (arguments.data / "prompts" / "spec_bench.jsonl").read_text(encoding="utf-8").splitlines()[:32]
    prompts = [tokenizer(json.loads(line)["turns"][0])["input_ids"] for line in lines]
    params = SamplingParams(max_new_tokens=arguments.new_tokens, ignore_eos=True)
    found, answers = {}, {}
    for name, options in (
        ("generate, prompt by prompt", None),
        ("engine, one pass", {}),
        ("engine, 2 x 16 by arrival", {"group_size": 16, "regrouping": False}),
        ("engine, 2 x 16 regrouped", {"group_size": 16}),
    ):
        model = load_moe(arguments.live, expert_memory="25%", predictor=None, dtype=arguments.dtype)
        with model.moeflow:
            begin, regrouping = time.perf_counter(), None
            if options is None:
                chosen = prompts[: arguments.generate]
                fixed = {"max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens}
                for prompt in chosen:
                    model.generate(torch.tensor([prompt]), do_sample=False, **fixed)
            else:
                chosen = prompts
                with Engine(model, tokenizer, **options) as engine:
                    answers[name] = [done.token_ids for done in engine.generate(prompts, params)]
                    regrouping = engine.stats()["regrouping"]
            seconds, stats = time.perf_counter() - begin, model.moeflow.stats()
        tokens = len(chosen) * arguments.new_tokens
        decode = stats["decode"]
        active = (decode["hits"] + decode["misses"]) / max(decode["forwards"], 1)
        found[name] = {
            "tokens_per_s": tokens / seconds, "active_a_pass": active, "hit_rate": decode["hit_rate"],
            "misses_a_token": (decode["misses"] + stats["prefill"]["misses"]) / tokens, "regrouping": regrouping,
        }  # fmt: skip
        print(
            f"{name:28s} {tokens / seconds:6.2f} tok/s   {active:6.1f} active experts a decode pass   hit rate "
            f"{decode['hit_rate']:.3f}   {found[name]['misses_a_token']:6.1f} misses a token"
        )
    same = len({json.dumps(ids) for ids in answers.values()}) == 1
    base = found["engine, 2 x 16 by arrival"]["tokens_per_s"]
    print(f"the engine's tokens are the same in all three: {same}")
    print(f"regrouped / by arrival {found['engine, 2 x 16 regrouped']['tokens_per_s'] / base:.3f} (1.15 wanted)")
    ratio = found["engine, one pass"]["tokens_per_s"] / found["generate, prompt by prompt"]["tokens_per_s"]
    print(f"engine / generate {ratio:.2f} (4 wanted)")
    return {**found, "same_tokens": same}


def _routes(experts, num_experts):
    """[tokens, L, K] ids as [tokens, L, E] bool."""
    routes = np.zeros((*experts.shape[:2], num_experts), bool)
    np.put_along_axis(routes, experts.astype(np.int64), True, 2)
    return routes


def _guess(trace, rows, step):
    """[L, E] bool, a guess of a step's routes from the tokens before it."""
    recent = _routes(trace.experts[max(rows.start, step - _RECENT) : step], trace.num_experts)
    uses = np.einsum("t,tle->le", _DECAY ** np.arange(len(recent))[::-1], recent)
    guess = np.zeros(uses.shape, bool)
    np.put_along_axis(guess, np.argsort(-uses, axis=1)[:, :_GUESSED], True, 1)
    return guess


if __name__ == "__main__":
    main()
