"""Pages: the chosen ones have the largest bounds, bounds are none too small, and a needle is found wherever it lies."""

import pytest
import torch

from helpers.engine_requests import tokens
from helpers.needle_model import NO_ANSWER, answer_of, haystack, needle_model
from helpers.runner_passes import Passes
from helpers.small_models import tiny_mixtral
from moeflow import Engine, SamplingParams
from moeflow.engine.kv_cache.policies.choosing import policy_of
from moeflow.engine.kv_cache.policies.pages import Pages
from moeflow.engine.kv_cache.policies.protocol import SegmentAttention

PAGE = 4


class WatchedPages(Pages):
    """Pages that remember what each call allowed."""

    def attend(self, call):
        """Attend, and note queries, keys and positions."""
        self.calls.append((call.start, call.queries, call.keys.clone(), self._limits(call).clone()))
        return super().attend(call)

    def _allowed(self, call, first, queries, limits):
        allowed = super()._allowed(call, first, queries, limits)
        self.allowed.append((first, queries, call.keys.clone(), allowed))
        return allowed


def watched(most, num_pages=5):
    """Return what a policy allowed of 61 tokens in pieces."""
    model = tiny_mixtral()
    policy = WatchedPages(policy_of({"name": "pages", "page": PAGE, "pages": num_pages}, model)._options)
    policy.calls, policy.allowed = [], []
    Passes(model, tokens(61, 1), most_new=64, policy=policy).begin(most)
    return policy


@pytest.mark.parametrize("most", [1, 7, 64])
def test_bounds_are_of_all_keys_and_the_best_pages_are_chosen(most):
    policy = watched(most)
    for _, _, keys, limits in policy.calls:
        whole = keys[0, :, : limits.shape[1] * PAGE].unflatten(1, (-1, PAGE))
        assert torch.equal(limits, torch.cat([whole.amin(2), whole.amax(2)], -1))
    num_chosen = 0
    for first, queries, keys, allowed in policy.allowed:
        for number in range(queries.shape[2]):
            position = first + number
            own = position // PAGE
            for head in range(keys.shape[1]):
                query = queries[0, 2 * head : 2 * head + 2, number]  # two heads of queries share the head of keys
                products = (keys[0, head] @ query.T)[: (position // PAGE) * PAGE].view(-1, PAGE, 2).amax((1, 2))
                pages = keys[0, head, : len(products) * PAGE].unflatten(0, (-1, PAGE))
                both = query[:, None] * torch.stack([pages.amin(1), pages.amax(1)])[:, None]
                bounds = both.amax(0).sum(-1).amax(0)
                assert (bounds >= products - 1e-4).all(), "a bound is one"
                seen = allowed[head, number]
                assert not seen[position + 1 :].any()
                seen = {page for page in range(own + 1) if bool(seen[page * PAGE])}
                assert seen >= {0, max(0, own - 1), own}
                others = sorted(range(1, own - 1), key=lambda page: -bounds[page])
                assert seen - {0, own - 1, own} == set(others[:2]), position
                num_chosen += len(others) > 2
    assert num_chosen > 100


@pytest.mark.parametrize("most", [1, 7])
def test_with_all_pages_chosen_every_bit_is_the_exact_one(most):
    model, found = tiny_mixtral(), []
    for option in ({"name": "pages", "page": PAGE, "pages": 16}, None):
        passes = Passes(model, tokens(56, 1), most_new=64, policy=policy_of(option, model))
        found.append(torch.cat([passes.begin(most), passes.say(tokens(8, 2))]))
    assert torch.equal(*found)


def test_one_query_that_chooses_all_pages_attends_to_what_is_there():
    """The rows that are taken out for a single query are the ones that its mask allows, in their order."""
    keys, values = (torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    taken = []
    call = SegmentAttention(
        0, None, 8, torch.zeros(1, 4, 1, 16), keys, values, None, lambda *given: taken.append(given), None
    )
    allowed = torch.ones(2, 1, 9, dtype=torch.bool)
    allowed[0, 0, 2:5] = allowed[1, 0, 4:7] = False
    call.attend_allowed(call.queries, allowed)
    ((_, some_keys, some_values, mask),) = taken
    assert mask is None
    for head, rows in enumerate(([0, 1, 5, 6, 7, 8], [0, 1, 2, 3, 7, 8])):
        assert torch.equal(some_keys[0, head], keys[0, head, rows])
        assert torch.equal(some_values[0, head], values[0, head, rows])


def test_notes_of_pages_are_counted_in_the_budget():
    model = tiny_mixtral()
    own = 3 * 2 * 2 * 16 * 4  # of the tiny Mixtral
    with Engine(model, kv_policy={"name": "pages", "page": 4, "pages": 4}, kv_memory=100 * (own + own // 4)) as engine:
        stats = engine.stats()
        assert stats["kv_position_bytes"] == own + own // 4
        assert stats["kv_positions"] == 100
        engine.add(tokens(40), SamplingParams(max_new_tokens=61, ignore_eos=True))
        while not engine.finished:
            engine.step()
            engine.check_integrity()
        assert engine.stats()["kv_peak_bytes"] <= 100 * (own + own // 4)


def test_a_needle_is_found_wherever_it_lies_and_none_is_made_up():
    params, option = SamplingParams(max_new_tokens=1), {"name": "pages", "page": 8, "pages": 6}
    with Engine(needle_model(), max_batch_size=1, kv_policy=option) as engine:
        for place in (3, 40, 250, 400, 470):
            (completion,) = engine.generate([haystack(500, {place: 2})], params)
            assert completion.token_ids == [answer_of(2)], place
        assert engine.stats()["kv_policy"]["attended_share"] < 0.3
        (completion,) = engine.generate([haystack(500, {})], params)
        assert completion.token_ids == [NO_ANSWER]
