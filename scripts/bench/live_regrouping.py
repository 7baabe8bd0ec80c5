"""Regrouping of tokens on a running model: engines whose steps take turns, and the bound of each step."""

import json
import statistics
import time
from contextlib import ExitStack

import numpy as np

from moeflow.engine.regrouping.oracles.best_split import best_split
from moeflow.engine.regrouping.search import active_pairs, arrival_groups, regroup

_PROOF_STEPS = 100_000_000  # of a best split's search, some seconds


class RouteLog:
    """Observer of a runtime that keeps the routers' choices of each pass, [tokens, L, E] bool."""

    def __init__(self, num_layers: int, num_experts: int):
        self.passes: list[np.ndarray] = []
        self._shape = num_layers, num_experts

    def begin_pass(self, begun) -> None:
        """A pass begins with its first layer's routes."""

    def observe(self, layer, top_k_index, top_k_weights, hidden_states) -> None:
        """Take in a layer of a pass."""
        if layer == 0:
            self.passes.append(np.zeros((len(top_k_index), *self._shape), bool))
        np.put_along_axis(self.passes[-1][:, layer], top_k_index.numpy(force=True), True, 1)

    def close(self) -> None:
        """Nothing is held."""


def bench_live(arguments) -> dict:
    """Measure tokens a second and active experts a pass of generate and of engines with different groups."""
    prompts = live_prompts(arguments)
    log = []
    runs = {
        "generate, prompt by prompt": run_generate(arguments, prompts[: arguments.generate]),
        "engine, one pass": run_engines(arguments, prompts, [{}], log)[0],
    }
    in_groups = [{"group_size": 16, "regrouping": False}, {"group_size": 16}]
    by_arrival, regrouped = run_engines(arguments, prompts, in_groups)
    runs |= {"engine, 2 x 16 by arrival": by_arrival, "engine, 2 x 16 regrouped": regrouped}
    for name, run in runs.items():
        print(
            f"{name:28s} {run['tokens_per_s']:6.2f} tok/s   {run['active_a_pass']:6.1f} active experts a decode pass   "
            f"hit rate {run['hit_rate']:.3f}   {run['misses_a_token']:6.1f} misses a token"
        )
    ratio = regrouped["tokens_per_s"] / by_arrival["tokens_per_s"]
    engine = runs["engine, one pass"]["tokens_per_s"] / runs["generate, prompt by prompt"]["tokens_per_s"]
    same = len({json.dumps(run["answers"]) for run in list(runs.values())[1:]}) == 1
    bound = bound_live([routes for routes in log if len(routes) == len(prompts)])
    print(f"the engine's tokens are the same in all its runs: {same}")
    print(f"regrouped / by arrival, steps in turn {ratio:.3f} (1.15 wanted)")
    print(f"engine / generate {engine:.2f} (4 wanted)")
    share, left = by_arrival["expert_share"], bound["best"] / bound["arrival"]
    ceiling = bound["ceiling"] = 1 / (1 - share * (1 - left))
    print(
        f"given true routes the best split of a step has {left:.3f} of the active experts by arrival (proven in "
        f"{bound['proven']} of {bound['steps']} steps); by arrival {share:.2f} of the time goes into experts of decode "
        f"passes: where each costs the same, no order is faster than {ceiling:.2f} times"
    )
    for run in runs.values():
        run.pop("answers", None)
    return {"runs": runs, "regrouped_to_arrival": ratio, "engine_to_generate": engine, "same": same, "bound": bound}


def live_prompts(arguments) -> list[list[int]]:
    """Token ids of the first 32 prompts of Spec-Bench."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.live)
    lines = (arguments.data / "prompts" / "spec_bench.jsonl").read_text(encoding="utf-8").splitlines()[:32]
    return [tokenizer(json.loads(line)["turns"][0])["input_ids"] for line in lines]


def load(arguments, expert_memory="25%"):
    """The model, without a predictor."""
    from moeflow import load_moe

    return load_moe(arguments.live, expert_memory=expert_memory, predictor=None, dtype=arguments.dtype)


def run_generate(arguments, prompts) -> dict:
    """Figures of `generate`, one prompt after the other."""
    import torch

    model = load(arguments)
    fixed = {"max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens, "do_sample": False}
    with model.moeflow:
        begin = time.perf_counter()
        for prompt in prompts:
            model.generate(torch.tensor([prompt]), **fixed)
        return figures(model, time.perf_counter() - begin, len(prompts) * arguments.new_tokens)


def run_engines(arguments, prompts, options: list[dict], log: list | None = None) -> list[dict]:
    """Figures of engines that run the same prompts, each on its own model, step by step in turn.

    Args:
        options: of each engine.
        log: gets the routes of the passes of the last one.
    """
    from moeflow.engine.engine import Engine
    from moeflow.engine.sampling_params import SamplingParams

    params = SamplingParams(max_new_tokens=arguments.new_tokens, ignore_eos=True)
    with ExitStack() as stack:
        engines = []
        for of_one in options:
            model = load(arguments)
            stack.enter_context(model.moeflow)
            engines.append(stack.enter_context(Engine(model, **of_one)))
        if log is not None:
            counts = model.moeflow.experts_per_layer
            log_routes = RouteLog(len(counts), max(counts))
            model.moeflow.observers.append(log_routes)
        ids = [[engine.add(prompt, params) for prompt in prompts] for engine in engines]
        seconds, answers = [0.0] * len(engines), [{} for _ in engines]
        turns = list(range(len(engines)))
        while not all(engine.finished for engine in engines):
            for turn in turns:
                begin = time.perf_counter()
                progress = engines[turn].step()
                seconds[turn] += time.perf_counter() - begin
                answers[turn] |= {one.id: one.completion.token_ids for one in progress if one.completion}
            turns.reverse()
        if log is not None:
            log += log_routes.passes
        return [
            figures(engine.model, seconds[turn], len(prompts) * arguments.new_tokens)
            | {"answers": [answers[turn][id] for id in ids[turn]], "regrouping": engine.stats()["regrouping"]}
            for turn, engine in enumerate(engines)
        ]


def figures(model, seconds: float, tokens: int) -> dict:
    """Figures of a run."""
    stats = model.moeflow.stats()
    decode = stats["decode"]
    return {
        "tokens_per_s": tokens / seconds,
        "active_a_pass": (decode["hits"] + decode["misses"]) / max(decode["forwards"], 1),
        "hit_rate": decode["hit_rate"],
        "misses_a_token": (decode["misses"] + stats["prefill"]["misses"]) / tokens,
        "expert_share": (decode["stall_s"] + decode["compute_s"]) / seconds,  # of the time; an order changes no other
    }


def bound_live(steps: list[np.ndarray]) -> dict:
    """Active pairs of all steps by arrival, by the search and by the best split, given true routes."""
    found = {"steps": len(steps), "arrival": 0, "search": 0, "best": 0, "proven": 0}
    for true in steps:
        best, proven = best_split(true, num_steps=_PROOF_STEPS)
        found["arrival"] += active_pairs(true, arrival_groups(len(true), 2))
        found["search"] += active_pairs(true, regroup(true, 2))
        found["best"] += active_pairs(true, best)
        found["proven"] += proven
    return found


def bench_nothing_to_gain(arguments) -> dict:
    """Seconds of a step with and without a scheduler where all sequences are the same, step by step in turn."""
    from moeflow.engine.engine import Engine
    from moeflow.engine.sampling_params import SamplingParams

    prompt, model = live_prompts(arguments)[0], load(arguments, "100%")
    seconds = {True: [], False: []}
    with model.moeflow:
        engines = {on: Engine(model, group_size=16, regrouping=on) for on in (True, False)}
        for engine in engines.values():
            for _ in range(32):
                engine.add(prompt, SamplingParams(max_new_tokens=2 * arguments.new_tokens, ignore_eos=True))
            while engine.stats()["passes"] == engine.stats()["steps"]:  # until all decode, in two passes
                engine.step()
        order = [True, False]
        while not engines[True].finished and not engines[False].finished:
            for on in order:
                begin = time.perf_counter()
                engines[on].step()
                seconds[on].append(time.perf_counter() - begin)
            order.reverse()
        stats = engines[True].stats()["regrouping"]
        for engine in engines.values():
            engine.close()
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    found = {
        "steps": len(ratios),
        "step_ms": 1e3 * statistics.median(seconds[False]),
        "planned": stats["planned"],
        "median": statistics.median(ratios),
        "sum": sum(seconds[True]) / sum(seconds[False]),
    }
    print(
        f"nothing to gain, {found['steps']} steps of {found['step_ms']:.0f} ms in turn, {found['planned']} of them "
        f"planned: {found['median']:.3f} times as long with the scheduler (median), {found['sum']:.3f} (sum); "
        "1.02 wanted"
    )
    return found
