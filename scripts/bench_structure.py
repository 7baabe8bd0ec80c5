"""Measure what structured output costs: mask and commit of a token, as a share of a decode step.

    python scripts/bench_structure.py MODEL [--memory 25% 100%] [--tokens 200] [--threads 1]

An answer under a schema of 20 fields is generated at temperature 1. Its tokens are then followed again by a matcher
alone, with a mask of logits for each token that is not forced: the median over five times is the cost. The step is that
of the same engine, one sequence, without a schema. The last line is one JSON object.
"""

import argparse
import json
import time
from statistics import median

import torch

from moeflow import Engine, SamplingParams, load_moe
from moeflow.engine.structure.grammars import grammars_of
from moeflow.engine.structure.logits_mask import masked
from moeflow.hf.passes.forward import end_tokens
from moeflow.hf.pretrained import load_tokenizer

KINDS = ({"type": "string", "maxLength": 20}, {"type": "integer"}, {"type": "boolean"}, {"enum": ["low", "high"]})
SCHEMA = {
    "type": "object",
    "properties": {f"field_{number}": KINDS[number % 4] for number in range(20)},
    "required": [f"field_{number}" for number in range(20)],
    "additionalProperties": False,
}


def main(argv=None) -> None:
    """Print a line for each memory, and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model, such as the demo model")
    parser.add_argument("--memory", nargs="+", default=["25%", "100%"], help="expert_memory")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    print(json.dumps({memory: bench(arguments, memory) for memory in arguments.memory}))


def bench(arguments, memory) -> dict:
    """Return seconds of a step and of a token's mask and commit."""
    tokenizer = load_tokenizer(arguments.model)
    model = load_moe(arguments.model, expert_memory=memory, device="cpu")
    bound = SamplingParams(json_schema=SCHEMA, temperature=1.0, seed=0, max_new_tokens=arguments.tokens)
    with model.moeflow, Engine(model, tokenizer, max_batch_size=1) as engine:
        prompt = "Some data as JSON: "
        (answer,) = engine.generate([prompt], bound)
        steps_s = step_seconds(engine, prompt, arguments.tokens)
        jumped = engine.stats()["steps"]
        (answer,) = engine.generate([prompt], bound)
        passes = engine.stats()["steps"] - jumped
    start_s, token_s = zip(*(follow(model, tokenizer, bound, answer.token_ids) for _ in range(5)), strict=True)
    figures = {
        "step_ms": 1000 * median(steps_s),
        "token_us": 1e6 * median(token_s),
        "share": median(token_s) / median(steps_s),
        "start_us": 1e6 * median(start_s),
        "tokens": len(answer.token_ids),
        "passes": passes,
    }
    print(
        f"{memory:>5} resident: {figures['token_us']:.0f} us a token of {figures['step_ms']:.1f} ms a step, "
        f"{figures['share']:.2%}; {figures['tokens']} tokens in {passes} passes",
        flush=True,
    )
    return figures


def step_seconds(engine, prompt, num_steps) -> list[float]:
    """Return the seconds of decode steps of one sequence without a schema, the first ones left out."""
    engine.add(prompt, SamplingParams(max_new_tokens=num_steps, temperature=1.0, seed=0, ignore_eos=True))
    times = []
    while not engine.finished:
        begin = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - begin)
    return times[5:]


def follow(model, tokenizer, params, token_ids) -> tuple[float, float]:
    """Return the seconds of a matcher's start, and of each token's mask and commit."""
    logits = torch.randn(model.config.vocab_size)
    begin = time.perf_counter()
    matcher = grammars_of(tokenizer, end_tokens(model, tokenizer)).start(*params.structure)
    start_s = time.perf_counter() - begin
    begin = time.perf_counter()
    for token_id in token_ids:
        if not matcher.forced:
            masked(logits, matcher.allowed)
        matcher.push(token_id)
    return start_s, (time.perf_counter() - begin) / len(token_ids)


if __name__ == "__main__":
    main()
