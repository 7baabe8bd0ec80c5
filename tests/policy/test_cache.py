"""ExpertCache against a ten-line model, and its promises one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.core import ExpertKey
from moeflow.errors import ConfigError
from moeflow.policy.cache import POLICIES, ExpertCache


def fill(cache, *experts):
    for expert in experts:
        key = ExpertKey(0, expert)
        cache.touch([key])
        cache.reserve(key)
        cache.commit(key)
        cache.unpin(key)


def demand(cache, expert):
    """One pass of layer 0 that demands one expert; returns what was evicted."""
    before, key = set(cache.resident()), ExpertKey(0, expert)
    cache.touch([key])
    if key not in cache:
        fill_slot = cache.reserve(key)
        assert fill_slot is not None
        cache.commit(key)
        cache.unpin(key)
    gone = before - set(cache.resident())
    return next(iter(gone)).expert if gone else None


def test_lru_evicts_the_least_recent():
    cache = ExpertCache(3, "lru")
    for expert in (0, 1, 2, 0):
        demand(cache, expert)
    assert demand(cache, 3) == 1


def test_lfu_evicts_the_least_frequent_and_frequency_outlives_eviction():
    cache = ExpertCache(2, "lfu")
    for expert in (0, 0, 0, 1):
        demand(cache, expert)
    assert demand(cache, 2) == 1
    assert demand(cache, 1) == 2  # 1 comes back with a count of 2 against 1
    assert demand(cache, 2) == 1  # now both have 2: the older goes


def test_lfru_weighs_frequency_by_age():
    cache = ExpertCache(2, "lfru")
    for expert in (0, 0, 0, 1):
        demand(cache, expert)
    # At the next pass 0 has 3 uses and age 2: 3/3; 1 has 1 use and age 1: 1/2
    assert demand(cache, 2) == 1
    for _ in range(6):
        demand(cache, 2)
    assert demand(cache, 1) == 0  # 0: 3/9, 2: 7/2


def test_age_counts_passes_of_the_experts_own_layer():
    """A layer that is about to run must not look old because others ran in between."""
    cache = ExpertCache(2, "lfru")
    for _ in range(2):
        for layer in (0, 1):
            key = ExpertKey(layer, 7)
            cache.touch([key])
            if key not in cache:
                cache.reserve(key)
                cache.commit(key)
                cache.unpin(key)
    cache.touch([ExpertKey(2, 0)])
    cache.reserve(ExpertKey(2, 0))
    assert ExpertKey(0, 7) in cache  # as young as (1, 7), and its layer comes first
    assert ExpertKey(1, 7) not in cache


def test_static_keeps_the_first_experts_for_good():
    cache = ExpertCache(4, "static", num_transient=2)
    for expert in range(20):
        demand(cache, expert)
    assert {key.expert for key in cache.resident()} >= {0, 1}


def test_pinned_expert_is_never_evicted():
    cache = ExpertCache(2, "lru")
    fill(cache, 0, 1)
    cache.pin(ExpertKey(0, 0))
    for expert in range(2, 12):
        demand(cache, expert)
        assert ExpertKey(0, 0) in cache
    cache.unpin(ExpertKey(0, 0))
    cache.check_integrity()


def test_reserve_gives_none_when_every_slot_is_pinned_or_loading():
    cache = ExpertCache(2, "lfru")
    fill(cache, 0)
    cache.pin(ExpertKey(0, 0))
    assert cache.reserve(ExpertKey(0, 1)) is not None  # loading, so pinned
    assert cache.reserve(ExpertKey(0, 2)) is None
    cache.check_integrity()


def test_aborted_copy_leaves_a_free_slot_and_no_trace():
    cache = ExpertCache(1, "lru")
    key = ExpertKey(0, 0)
    cache.reserve(key)
    assert key not in cache
    assert cache.slot(key) == 0
    cache.abort(key)
    assert len(cache) == 0
    cache.check_integrity()
    fill(cache, 5)


def test_unknown_policy_names_the_allowed_ones():
    with pytest.raises(ConfigError, match="lru, lfu, lfru, static"):
        ExpertCache(2, "best")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), st.integers(1, 5), st.lists(st.integers(0, 9), max_size=60))
def test_random_operations_keep_the_invariants(policy, num_slots, operations):
    cache, pinned, loading = ExpertCache(num_slots, policy), [], []
    for step, number in enumerate(operations):
        key = ExpertKey(step % 2, number)
        cache.touch([key])
        if key in cache:
            cache.pin(key)
            pinned.append(key)
        elif key not in loading and cache.reserve(key) is not None:
            loading.append(key)
        if loading and number % 3 == 0:
            cache.abort(loading.pop())
        elif loading and number % 2 == 0:
            cache.commit(loading[0])
            cache.unpin(loading.pop(0))
        if pinned and number % 4 == 1:
            cache.unpin(pinned.pop())
        cache.check_integrity()
        assert all(key in cache for key in pinned)
        assert len(cache) <= num_slots
        assert cache.num_pinned == len(set(pinned)) + len(loading)


def test_lower_limit_evicts_by_policy_and_higher_limit_lets_experts_in_again():
    cache = ExpertCache(4, "lru")
    fill(cache, 0, 1, 2, 3)
    cache.pin(ExpertKey(0, 0))
    assert len(cache.set_limit(2)) == 2
    assert {key.expert for key in cache.resident()} == {0, 3}
    assert demand(cache, 9) == 3  # full at two
    cache.check_integrity()
    assert cache.set_limit(3) == []
    assert demand(cache, 8) is None
    assert len(cache) == 3


def test_passes_in_which_a_layer_demands_nothing_make_its_experts_old():
    cache = ExpertCache(2, "lfru")
    cache.touch([ExpertKey(1, 3)])
    before = cache.usual_rate(2, 4)[1, 3]
    cache.touch_layers(np.array([1]), np.empty((1, 0), np.int64))
    assert cache.usual_rate(2, 4)[1, 3] < before
    assert cache.uses(ExpertKey(1, 3)) == 1
