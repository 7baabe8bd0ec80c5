"""Prefetcher and cache together: which expert is fetched, which is evicted, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fake_predictor import Foretold
from moeflow.core import ExpertKey
from moeflow.errors import PredictorError
from moeflow.policy.cache import ExpertCache
from moeflow.policy.demand import Demand
from moeflow.policy.prefetch import Prefetcher
from moeflow.policy.prefetch_ledger import PrefetchLedger

L, E = 3, 4


def key(layer, expert):
    return ExpertKey(layer, expert)


def build(now, later=None, num_slots=4, policy="forecast", **options):
    """A prefetcher before its first step, and its cache."""
    cache = ExpertCache(num_slots, policy)
    prefetcher = Prefetcher(Foretold(now, later), cache, PrefetchLedger(L), **options)
    prefetcher.begin(1)
    return prefetcher, cache


def place(cache, *keys):
    for one in keys:
        cache.reserve(one)
        cache.commit(one)
        cache.unpin(one)


def step(prefetcher, row=0):
    prefetcher.begin_step(np.array([row]))


def take_all(prefetcher):
    """Take until nothing is worth it; every copy stays under way."""
    taken = []
    while (found := prefetcher.take()) is not None:
        taken.append(found[0])
    return taken


def pass_layer(prefetcher, cache, layer, *experts):
    keys = [key(layer, expert) for expert in experts]
    cache.touch(keys)
    resident = [one for one in keys if one in cache]
    absent = [one for one in keys if one not in cache.slots]
    prefetcher.record_demand(Demand(layer, resident, [], absent, 1.0, []))
    prefetcher.observe(layer, np.array([experts]), None, None)


def certain(*keys, steps=1):
    """Probabilities [steps, L, E] with 1 for these experts."""
    now = np.zeros((steps, L, E), np.float32)
    for one in keys:
        now[:, one[0], one[1]] = 1
    return now


def test_an_expert_that_is_there_or_on_its_way_is_never_fetched():
    prefetcher, cache = build(certain(key(0, 0), key(1, 1), key(2, 2)))
    place(cache, key(1, 1))
    step(prefetcher)
    assert take_all(prefetcher) == [key(0, 0), key(2, 2)]
    pass_layer(prefetcher, cache, 0, 3)  # planned anew while both are on their way
    assert take_all(prefetcher) == []
    cache.check_integrity()


def test_the_nearest_of_equally_likely_experts_is_fetched_first():
    prefetcher, _ = build(certain(*[key(layer, 0) for layer in range(L)]))
    step(prefetcher)
    assert [one.layer for one in take_all(prefetcher)] == [0, 1, 2]


def test_the_likeliest_of_equally_near_experts_is_fetched_first():
    now = np.zeros((1, L, E))
    now[0, 1] = 0.7, 0.9, 0.6, 0.8
    prefetcher, _ = build(now)
    step(prefetcher)
    assert [one.expert for one in take_all(prefetcher)] == [1, 3, 0, 2]


def test_unlikely_experts_are_not_fetched_even_into_free_slots():
    now = np.zeros((1, L, E))
    now[0, 0] = 0.01, 0.05, 0, 0.9
    prefetcher, _ = build(now)
    step(prefetcher)
    assert take_all(prefetcher) == [key(0, 3)]


def test_the_window_says_how_far_ahead_is_fetched():
    prefetcher, cache = build(certain(*[key(layer, 0) for layer in range(L)], steps=2), window=1, num_slots=6)
    step(prefetcher)
    assert take_all(prefetcher) == [key(0, 0)]
    pass_layer(prefetcher, cache, 0, 0)
    assert take_all(prefetcher) == [key(1, 0)]


def test_the_window_reaches_into_the_next_step_where_that_is_foretold():
    now, later = certain(steps=1), certain(key(0, 2))[None]
    for told, expected in ((later, [key(0, 2)]), (None, [])):
        prefetcher, cache = build(now, told)
        step(prefetcher)
        for layer in range(L - 1):
            pass_layer(prefetcher, cache, layer, 3)
        assert take_all(prefetcher) == expected


def test_an_expert_is_not_evicted_for_a_less_likely_one():
    now = np.zeros((1, L, E))
    now[0, 1] = 0.9, 0.8, 0.7, 0.6
    prefetcher, cache = build(now, np.zeros((1, 1, L, E)), num_slots=2)
    place(cache, key(1, 0), key(1, 2))
    step(prefetcher)
    assert take_all(prefetcher) == [key(1, 1)]
    assert set(cache.slots) == {key(1, 0), key(1, 1)}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_no_eviction_for_a_prefetch_loses_worth(seed, num_slots):
    rng = np.random.default_rng(seed)
    prefetcher, cache = build(rng.random((4, L, E)), rng.random((4, 2, L, E)), num_slots)
    for row in range(4):
        step(prefetcher, row)
        for layer in range(L):
            worth, taken = cache.forecast.worth.copy(), []
            while (found := prefetcher.take()) is not None:
                taken.append(found[0])
                assert all(worth[gone] < worth[found[0]] for gone in cache.evicted)
                cache.check_integrity()
                if rng.random() < 0.7:
                    cache.commit(found[0])
                    cache.unpin(found[0])
                    taken.pop()
            for one in taken:
                cache.abort(one)
                prefetcher.ledger.drop(one)
            pass_layer(prefetcher, cache, layer, *rng.choice(E, 2, replace=False))


def test_a_mispredicted_expert_goes_before_one_that_is_still_expected():
    now, later = np.zeros((1, L, E)), np.zeros((1, 2, L, E))
    now[0, 0, 0], now[0, 2, 2] = 0.9, 0.4
    prefetcher, cache = build(now, later, num_slots=2)
    place(cache, key(0, 0), key(2, 2))
    step(prefetcher)
    pass_layer(prefetcher, cache, 0, 1)  # and not 0, as was foretold
    assert cache.reserve(key(0, 1)) is not None
    assert cache.evicted == [key(0, 0)]


def test_a_queued_prefetch_is_overdue_when_its_layer_passes():
    prefetcher, cache = build(certain(key(0, 0), key(1, 0)), window=2)
    step(prefetcher)
    keys = take_all(prefetcher)
    assert prefetcher.overdue(keys) == []
    pass_layer(prefetcher, cache, 0, 3)
    assert prefetcher.overdue(keys) == [key(0, 0)]


@pytest.mark.parametrize("window", [1, None])
def test_the_layer_that_runs_is_past_fetching(window):
    prefetcher, cache = build(certain(key(0, 0), key(0, 1)), window=window)
    step(prefetcher)
    keys = take_all(prefetcher)
    pass_layer(prefetcher, cache, 0, 3)
    assert prefetcher.overdue(keys) == keys


def test_an_expert_that_was_demanded_meanwhile_is_not_fetched_again():
    now = certain(key(0, 0), key(0, 1), key(1, 2))
    now[0, 0, 1] = 0.9
    prefetcher, cache = build(now)
    step(prefetcher)
    assert prefetcher.take()[0] == key(0, 0)
    place(cache, key(0, 1))  # on demand, after the queue was planned
    assert take_all(prefetcher) == [key(1, 2)]


def test_a_losing_layer_is_not_fetched_for():
    prefetcher, _ = build(certain(key(0, 0), key(1, 0)), num_slots=3)
    for _ in range(20):
        prefetcher.ledger.start(key(0, 0), 1, evicted=[key(2, 3)])
        prefetcher.ledger.record_demand(Demand(2, [], [], [key(2, 3)], 1.0, []))
    prefetcher.ledger.decay()
    step(prefetcher)
    assert take_all(prefetcher) == [key(1, 0)]


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.5])
@pytest.mark.parametrize("where", ["now", "later"])
def test_an_answer_that_is_no_probability_is_refused(value, where):
    bad = np.full((1, L, E), value)
    prefetcher, _ = build(bad) if where == "now" else build(certain(), bad[None])
    with pytest.raises(PredictorError, match="'foretold' answered with probabilities"):
        step(prefetcher)


def test_an_unknown_part_of_an_answer_is_no_failure():
    now = certain(key(1, 1))
    now[0, 2] = np.nan
    prefetcher, _ = build(now)
    step(prefetcher)
    assert take_all(prefetcher) == [key(1, 1)]


def test_any_sequence_of_a_batch_may_demand():
    """Two sequences that want an expert with probability one half each want it with three quarters together."""

    class Twice(Foretold):
        def step(self, token_ids):
            return np.repeat(super().step(token_ids), 2, axis=0)

    now = np.zeros((1, L, E))
    now[0, 0, 0] = 0.5
    cache = ExpertCache(4, "forecast")
    prefetcher = Prefetcher(Twice(now), cache, PrefetchLedger(L))
    prefetcher.begin(2)
    step(prefetcher)
    np.testing.assert_allclose(cache.forecast.now[0, 0], 0.75)


def test_at_rest_the_cache_goes_by_what_it_saw():
    prefetcher, cache = build(certain(key(1, 1)))
    assert not prefetcher.active
    step(prefetcher)
    assert prefetcher.active
    prefetcher.rest()
    assert not prefetcher.active
    assert cache.forecast is None
    assert prefetcher.take() is None


def test_experts_of_layers_behind_the_predictors_are_evicted_by_use_and_not_fetched():
    prefetcher, cache = build(certain(key(0, 0)), num_slots=2, num_layers=L + 1)
    place(cache, key(L, 0), key(L, 1))
    for _ in range(3):
        cache.touch([key(L, 0)])
    step(prefetcher)
    assert take_all(prefetcher) == [key(0, 0)]
    assert key(L, 0) in cache, "the one of the last layer that was never used goes"
    cache.check_integrity()
