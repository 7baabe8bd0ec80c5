"""The best split: none is better, sizes are equal, and what is proven is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.engine.regrouping.oracles import best_split as best_split_module
from moeflow.engine.regrouping.oracles.best_split import best_split
from moeflow.engine.regrouping.oracles.bound import regroup_bound
from moeflow.engine.regrouping.oracles.exact import exact_groups
from moeflow.engine.regrouping.search import active_pairs, regroup
from moeflow.errors import ConfigError


def random_routes(seed, tokens, layers=3, experts=7, share=0.3):
    return np.random.default_rng(seed).random((tokens, layers, experts)) < share


def fewest_of_all(routes):
    """Try every split, each a number whose bits mark the tokens of the second group."""
    tokens = len(routes)
    splits = [s for s in range(2**tokens) if s.bit_count() == tokens // 2]
    sides = np.array([[s >> token & 1 for token in range(tokens)] for s in splits], bool)
    flat = routes.reshape(tokens, -1)
    return min(int(flat[side].any(0).sum() + flat[~side].any(0).sum()) for side in sides)


@given(st.integers(0, 10**6), st.integers(2, 11), st.floats(0.0, 1.0))
@settings(max_examples=60, deadline=None)
def test_no_split_of_all_is_better(seed, tokens, share):
    routes = random_routes(seed, tokens, share=share)
    groups, proven = best_split(routes)
    assert proven
    assert active_pairs(routes, groups) == fewest_of_all(routes)
    assert np.bincount(groups, minlength=2).tolist() == [-(-tokens // 2), tokens // 2]


@pytest.mark.slow
def test_a_program_finds_no_better_one_where_the_search_alone_does_not_get_there(monkeypatch):
    monkeypatch.setattr(best_split_module, "regroup", lambda routes, num_groups: regroup(routes, 2, num_swaps=0))
    for seed in range(10):
        routes = random_routes(seed, 11 + seed % 2, layers=4, experts=9, share=0.2)
        groups, proven = best_split(routes)
        assert proven
        assert np.bincount(groups).tolist() == [6, len(routes) - 6]
        assert active_pairs(routes, groups) == active_pairs(routes, exact_groups(routes, 2)[0])


def test_it_is_never_below_the_bound_nor_above_the_search():
    routes = random_routes(1, 24, layers=8, experts=16, share=0.1)
    groups, proven = best_split(routes)
    assert proven
    assert regroup_bound(routes, 2) <= active_pairs(routes, groups) <= active_pairs(routes, regroup(routes, 2))


def test_what_was_not_searched_to_the_end_is_not_called_proven():
    routes = random_routes(2, 24, layers=8, experts=16, share=0.1)
    groups, proven = best_split(routes, num_steps=10)
    assert not proven
    assert active_pairs(routes, groups) == active_pairs(routes, regroup(routes, 2))


@pytest.mark.parametrize("tokens", [0, 1])
def test_one_token_is_not_split(tokens):
    with pytest.raises(ConfigError, match="at least two"):
        best_split(random_routes(0, tokens))


def test_without_the_c_loop_an_integer_program_proves_the_same(monkeypatch):
    routes = random_routes(3, 10)
    built = active_pairs(routes, best_split(routes)[0])
    monkeypatch.setattr(best_split_module, "c_function", lambda *args, **kwargs: None)
    groups, proven = best_split(routes)
    assert (active_pairs(routes, groups), proven) == (built, True)
