"""Concurrent clients over HTTP against Engine.generate on the same prompts, in turns.

Knows what is measured and printed.
"""

import argparse
import statistics
import time

from bench.rounds import ranged, spread
from bench.server.clients import TEXT, ask_all
from bench.server.process import moeflow_server
from moeflow.calibration.sample_texts import library_texts

GOAL, GOAL_MS = 0.95, 0.3
PROMPT_TOKENS = 48


def measure(arguments: argparse.Namespace) -> dict:
    """Return tokens a second of both, their ratio, and the event loop's time a token.

    What runs second finds another disk and another cache than what runs first, so that a ratio is the geometric mean of
    both orders' medians. Neither side predicts: each would switch prediction off, or not, by its own timing.
    """
    import torch

    from moeflow import Engine, SamplingParams, load_moe
    from moeflow.cli.options import prepare_step
    from moeflow.hf.pretrained import load_tokenizer

    torch.set_num_threads(arguments.threads)
    tokenizer = load_tokenizer(arguments.model)
    clients, tokens = arguments.clients, arguments.tokens
    wanted = clients * (arguments.rounds + 1)
    pieces = library_texts(tokenizer, wanted * PROMPT_TOKENS, PROMPT_TOKENS)
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    rates: dict[str, list[float]] = {"http": [], "generate": []}
    quotient: dict[str, list[float]] = {"http": [], "generate": []}  # of both rates, by the side that went first
    loop_ms, outside = [], []
    model = load_moe(arguments.model, expert_memory=arguments.memory, device="cpu", predictor=None)
    prepare_step(model)
    with (
        model.moeflow,
        Engine(model, tokenizer) as engine,
        moeflow_server(arguments.model, arguments.memory, arguments.threads, "--predictor", "none") as server,
    ):
        for turn in range(arguments.rounds + 1):
            prompts = pieces[turn * clients : (turn + 1) * clients]
            bodies = [{"prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} for ids in prompts]
            found = {}
            order = ("http", "generate") if turn % 2 else ("generate", "http")
            for side in order:
                before = server.stats()
                begin_s = time.perf_counter()
                if side == "http":
                    ask_all(server.url, TEXT, bodies)
                else:
                    engine.generate(prompts, params)
                took_s = time.perf_counter() - begin_s
                found[side] = clients * tokens / took_s
                if side == "http" and turn:
                    after = server.stats()
                    loop_ms.append(1000 * (after["http"]["cpu_s"] - before["http"]["cpu_s"]) / (clients * tokens))
                    outside.append(1 - (after["engine"]["step_s"] - before["engine"]["step_s"]) / took_s)
            if turn:  # the first one warms up
                quotient[order[0]].append(found["http"] / found["generate"])
                for side, rate in found.items():
                    rates[side].append(rate)
    return {
        "clients": clients,
        "tokens": tokens,
        "http_tokens_per_s": spread(rates["http"]),
        "generate_tokens_per_s": spread(rates["generate"]),
        "ratio": statistics.geometric_mean(statistics.median(found) for found in quotient.values() if found),
        "by_order": {first: spread(found) for first, found in quotient.items() if found},
        "goal": GOAL,
        "loop_ms_per_token": spread(loop_ms),
        "outside_steps": spread(outside),
        "goal_ms": GOAL_MS,
    }


def lines(found: dict) -> list[str]:
    """Return what is printed."""
    return [
        f"{found['clients']} clients, {found['tokens']} tokens each",
        f"over HTTP: {ranged(found['http_tokens_per_s'], 1, 0, 1)} tok/s",
        f"Engine.generate: {ranged(found['generate_tokens_per_s'], 1, 0, 1)} tok/s",
        f"ratio {found['ratio']:.3f}, goal at least {found['goal']}",
        *(f"  where {first} goes first: {ranged(ratio, 1, 0, 3)}" for first, ratio in found["by_order"].items()),
        f"of the time over HTTP {ranged(found['outside_steps'], 100, 0, 2)} % lie outside the engine's steps",
        f"event loop {ranged(found['loop_ms_per_token'], 1, 0, 3)} ms a token, goal below {found['goal_ms']}",
    ]
