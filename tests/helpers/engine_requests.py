"""Prompts for an engine on the tiny Mixtral, the tokens of generate() for them, and what an idle engine holds."""

import torch

from moeflow.engine.sampling_params import SamplingParams

NEW = 8
POSITION_BYTES = 3 * 2 * 2 * 16 * 4  # of the tiny Mixtral: layers, keys and values, heads, features, float32


def tokens(count, seed=0, below=120):
    return torch.randint(3, below, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PREFIX = tokens(18)
PROMPTS = [
    tokens(1, 1),
    PREFIX + tokens(3, 2),
    tokens(11, 3),
    PREFIX + tokens(1, 4),
    tokens(5, 5),
    PREFIX + tokens(7, 6),
]
GREEDY = SamplingParams(max_new_tokens=NEW, ignore_eos=True)


def generated(model, prompt, num_new=NEW):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": num_new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        return model.generate(ids, **options)[0, len(prompt) :].tolist()


def answers(engine, prompts=PROMPTS, params=GREEDY):
    completions = engine.generate(prompts, params)
    assert [completion.error for completion in completions] == [None] * len(prompts)
    return [completion.token_ids for completion in completions]


def run_within(engine, prompt, params, most):
    """Run a request to its end; its keys and values take at most so many bytes at each step."""
    engine.add(prompt, params)
    while not engine.finished:
        engine.step()
        engine.check_integrity()
        assert engine.stats()["kv_used_bytes"] <= most


def assert_empty(engine):
    engine.check_integrity()
    stats = engine.stats()
    assert (stats["kv_used_bytes"], stats["waiting"], stats["running"]) == (0, 0, 0)
    assert engine.finished
