"""Heavy hitters: those stay that a small reference keeps, position by position, and so does a needle."""

import math

import pytest
import torch

from helpers.engine_requests import run_within, tokens
from helpers.needle_model import NO_ANSWER, answer_of, haystack, needle_model
from helpers.runner_passes import Passes
from helpers.small_models import tiny_mixtral
from moeflow import Engine, SamplingParams
from moeflow.engine.kv_cache.policies.choosing import policy_of


@torch.no_grad()
def products(model, ids):
    """Return queries [H, n, D] and keys [heads, n, D] of the only layer, turned by their positions."""
    from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb

    layer = model.model.layers[0]
    states = layer.input_layernorm(model.model.embed_tokens(torch.tensor([ids])))
    cosine = model.model.rotary_emb(states, torch.arange(len(ids))[None])
    queries, keys = (
        projection(states).view(1, len(ids), -1, 16).transpose(1, 2)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    queries, keys = apply_rotary_pos_emb(queries, keys, *cosine)
    return queries[0], keys[0]


def kept_by_reference(queries, keys, budget, recent, block):
    """Return the positions that each head of keys keeps, one query after the other."""
    kept = []
    group = len(queries) // len(keys)
    for head in range(len(keys)):
        have, mass = [], {}
        for position in range(keys.shape[1]):
            have.append(position)
            mass[position] = 0.0
            for query in queries[head * group : (head + 1) * group, position]:
                weights = torch.softmax(keys[head, have] @ query / math.sqrt(16), 0)
                for one, weight in zip(have, weights.tolist(), strict=True):
                    mass[one] += weight
            if (position + 1) % block == 0 and len(have) > budget:
                others, last = have[: len(have) - recent], have[len(have) - recent :]
                best = sorted(others, key=lambda one: -mass[one])[: budget - recent]
                have = sorted(best) + last
        kept.append(have)
    return kept


@pytest.mark.parametrize("most", [1, 5, 64])
@pytest.mark.parametrize("sizes", [(12, 4, 1), (12, 4, 8), (9, 8, 3)], ids=str)
def test_those_stay_that_the_reference_keeps(sizes, most):
    budget, recent, block = sizes
    model, ids = tiny_mixtral(num_hidden_layers=1), tokens(61, 1)
    option = {"name": "heavy_hitters", "budget": budget, "recent": recent, "block": block}
    passes = Passes(model, ids, most_new=64, policy=policy_of(option, model))
    passes.begin(most)
    passes.runner.memory.grow(passes.sequence)
    queries, keys = products(model, ids)
    expected = kept_by_reference(queries, keys, *sizes)
    assert all(have != [*range(61 - len(have), 61)] for have in expected), "some are not the last ones"
    assert expected[0] != expected[1], "each head of keys has its own"
    (found, _) = passes.runner.memory["one"].read(0, 61)
    for head, have in enumerate(expected):
        torch.testing.assert_close(found[0, head], keys[head, have])


def test_a_slot_grows_no_more_however_long_its_sequence():
    option = {"name": "heavy_hitters", "budget": 24, "recent": 8, "block": 8}
    model, params = tiny_mixtral(max_position_embeddings=4096), SamplingParams(max_new_tokens=60, ignore_eos=True)
    most = (24 + 8 + 16) * 3 * 2 * (2 * 16 * 4 + 4)  # with a number beside the keys and values of each head
    with Engine(model, max_batch_size=1, max_step_tokens=16, kv_policy=option) as engine:
        for prompt in (tokens(9), tokens(500)):
            run_within(engine, prompt, params, most)
        assert engine.stats()["kv_peak_bytes"] == most


def test_needles_that_queries_look_at_are_found_and_none_is_made_up():
    option = {"name": "heavy_hitters", "budget": 64, "recent": 32, "block": 16}
    with Engine(needle_model(), max_batch_size=1, kv_policy=option) as engine:
        for place in (3, 40, 400, 470):
            (completion,) = engine.generate([haystack(500, {place: 2})], SamplingParams(max_new_tokens=1))
            assert completion.token_ids == [answer_of(2)], place
        assert engine.stats()["kv_policy"]["attended_share"] < 0.3
        (completion,) = engine.generate([haystack(500, {})], SamplingParams(max_new_tokens=1))
        assert completion.token_ids == [NO_ANSWER]
