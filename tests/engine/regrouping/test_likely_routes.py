"""Likely routes: what a token took before, and what a sequence is about."""

import numpy as np

from moeflow.engine.regrouping.likely_routes import LikelyRoutes


def took(*experts):
    """[tokens, 1, 1] ids."""
    return np.array(experts)[:, None, None]


def likely(routes, sequence, token):
    return set(np.flatnonzero(routes.likely([sequence], [token])[0, 0]).tolist())


def test_a_token_is_expected_to_take_what_it_took_in_another_sequence():
    routes = LikelyRoutes(1, 4, 1)
    routes.observe("a", [7], took(3))
    routes.observe("a", [8], took(1))
    assert (likely(routes, "b", 7), likely(routes, "b", 8)) == ({3}, {1})
    routes.forget("a")
    assert likely(routes, "b", 7) == {3}


def test_a_token_never_seen_is_expected_to_take_what_the_sequence_took_last():
    routes = LikelyRoutes(1, 4, 1)
    for expert in (2, 2, 2, 0, 0, 0, 0, 0):
        routes.observe("a", [expert], took(expert))
    assert likely(routes, "a", 99) == likely(routes, "a", None) == {0}


def test_nothing_is_expected_where_nothing_was_seen():
    routes = LikelyRoutes(2, 4, 2)
    assert not routes.likely(["new", "newer"], [5, None]).any()
    routes.observe("a", [1], np.full((1, 2, 2), 4))  # none
    assert not routes.likely(["a"], [1]).any()


def test_no_more_experts_are_expected_than_a_token_takes():
    rng = np.random.default_rng(0)
    routes = LikelyRoutes(3, 10, 2)
    routes.observe("a", [1, 2, 1, 3], rng.random((4, 3, 10)).argsort(axis=2)[:, :, :2])
    assert routes.likely(["a"] * 3, [1, 2, None]).sum(axis=2).max() == 2


def test_many_tokens_at_once_are_as_one_by_one():
    rng = np.random.default_rng(0)
    tokens, seen = rng.integers(0, 3, 99).tolist(), rng.random((99, 3, 10)).argsort(axis=2)[:, :, :3]
    at_once, one_by_one = LikelyRoutes(3, 10, 2), LikelyRoutes(3, 10, 2)
    at_once.observe("a", tokens, seen)
    for token, route in zip(tokens, seen, strict=True):
        one_by_one.observe("a", [token], route[None])
    for token in (0, 1, 2, None):
        assert (at_once.likely(["a"], [token]) == one_by_one.likely(["a"], [token])).all()


def test_a_tokens_late_uses_count_more_than_its_early_ones():
    routes = LikelyRoutes(1, 4, 1)
    for expert in [3] * 10 + [1] * 3:
        routes.observe("a", [7], took(expert))
    assert likely(routes, "b", 7) == {1}


def test_tokens_fed_longest_ago_are_forgotten_first_when_memory_ends():
    routes = LikelyRoutes(1, 4, 1, memory_bytes=2 * 4)  # of two tokens
    for token in (1, 2, 1, 3):
        routes.observe("a", [token], took(token % 4))
    assert [likely(routes, "b", token) for token in (1, 2, 3)] == [{1}, set(), {3}]


def test_a_token_seen_once_counts_less_than_what_a_sequence_takes_all_the_time():
    for tokens, expected in ((8, {3}), (30, {0})):
        routes = LikelyRoutes(1, 4, 1)
        routes.observe("b", [7], took(3))
        routes.observe("a", list(range(100, 100 + tokens)), took(*[0] * tokens))
        assert likely(routes, "a", 7) == expected


def test_what_tokens_took_stays_within_the_memory_however_often_they_are_fed():
    routes = LikelyRoutes(3, 10, 2, memory_bytes=200)
    for token in range(200):
        routes.observe("a", [token % 7], np.ones((1, 3, 2), int))
    assert 0 < sum(route.nbytes for kept in routes._tokens.values() for route in kept) <= 200
