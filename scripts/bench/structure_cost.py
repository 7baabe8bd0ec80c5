"""What a schema of 20 fields costs a decode step: the time of mask and commit of each token, beside a step without.

Knows engines and grammars. Knows nothing of what is printed.
"""

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


def schema_cost(folder, memory: str, num_tokens: int) -> dict:
    """Return the times of a step and of a token's mask and commit.

    Args:
        folder: of the model.
        memory: its expert_memory.
        num_tokens: of the answer, at most.
    """
    tokenizer = load_tokenizer(folder)
    model = load_moe(folder, expert_memory=memory, device="cpu")
    bound = SamplingParams(json_schema=SCHEMA, temperature=1.0, seed=0, max_new_tokens=num_tokens)
    with model.moeflow, Engine(model, tokenizer, max_batch_size=1) as engine:
        prompt = "Some data as JSON: "
        (answer,) = engine.generate([prompt], bound)
        steps_s = step_seconds(engine, prompt, num_tokens)
        jumped = engine.stats()["steps"]
        (answer,) = engine.generate([prompt], bound)
        passes = engine.stats()["steps"] - jumped
    start_s, token_s = zip(*(follow(model, tokenizer, bound, answer.token_ids) for _ in range(5)), strict=True)
    return {
        "step_ms": 1000 * median(steps_s),
        "token_us": 1e6 * median(token_s),
        "share": median(token_s) / median(steps_s),
        "start_us": 1e6 * median(start_s),
        "tokens": len(answer.token_ids),
        "passes": passes,
    }


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
