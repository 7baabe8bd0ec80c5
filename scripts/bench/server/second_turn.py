"""The second turn of a conversation: when its first token comes, and whether its tokens are those without kept keys.

Knows what is measured and printed.
"""

import argparse

from bench.rounds import quotients, ranged, spread
from bench.server.clients import CHAT, ask
from bench.server.process import moeflow_server
from moeflow.calibration.sample_texts import library_texts

GOAL = 0.15
QUESTION = "And what would you change first?"
NEW_TOKENS = 16


def measure(arguments: argparse.Namespace) -> dict:
    """Return the TTFT of first and second turns over HTTP, and whether kept keys leave the tokens as they are."""
    from moeflow.hf.pretrained import load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    size = arguments.conversation
    pieces = library_texts(tokenizer, size * (arguments.rounds + 1), size)[: arguments.rounds + 1]
    first, second, cached = [], [], []
    with moeflow_server(arguments.model, arguments.memory, arguments.threads) as server:
        for number, ids in enumerate(pieces):
            body = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
            messages = [{"role": "user", "content": tokenizer.decode(ids)}]
            before = ask(server.url, CHAT, {**body, "messages": messages})
            shared = server.stats()["engine"]["shared_tokens"]
            messages += [{"role": "assistant", "content": before.text}, {"role": "user", "content": QUESTION}]
            after = ask(server.url, CHAT, {**body, "messages": messages})
            if number:  # the first one warms up
                first.append(before.ttft_s)
                second.append(after.ttft_s)
                cached.append(server.stats()["engine"]["shared_tokens"] - shared)
    return {
        "prompt_tokens": size,
        "first_s": spread(first),
        "second_s": spread(second),
        "cached_tokens": spread(cached),
        "ratio": quotients(second, first),
        "goal": GOAL,
        "same_tokens": same_tokens(arguments, tokenizer, pieces[0]),
    }


def same_tokens(arguments: argparse.Namespace, tokenizer, ids: list[int]) -> bool:
    """Return whether a second turn behind kept keys has the tokens of a fresh computation, in float32."""
    from moeflow import Engine, SamplingParams, load_moe

    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    model = load_moe(arguments.model, dtype="float32", expert_memory=arguments.memory, device="cpu")
    with model.moeflow:
        with Engine(model, tokenizer) as engine:
            (answer,) = engine.generate([ids], params)
            turn = ids + answer.token_ids + question
            (kept,) = engine.generate([turn], params)
        with Engine(model, tokenizer, share_prefixes=False) as engine:
            (fresh,) = engine.generate([turn], params)
    return kept.cached_tokens >= len(ids) and fresh.cached_tokens == 0 and kept.token_ids == fresh.token_ids


def lines(found: dict) -> list[str]:
    """Return what is printed."""
    return [
        f"first turn, {found['prompt_tokens']} tokens: {ranged(found['first_s'], 1, 0, 2)} s to the first token",
        f"second turn, {found['cached_tokens']['median']:.0f} tokens kept: {ranged(found['second_s'], 1, 0, 2)} s",
        f"ratio {ranged(found['ratio'], 1, 0, 3)}, goal at most {found['goal']}",
        f"tokens in float32 {'are those' if found['same_tokens'] else 'ARE NOT THOSE'} of a fresh computation",
    ]
