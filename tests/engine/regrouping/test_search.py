"""Regrouping: fewer active pairs, the same groups' sizes, and nothing better than what is proven."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.engine.regrouping import search as regroup_module
from moeflow.engine.regrouping.oracles.bound import regroup_bound
from moeflow.engine.regrouping.oracles.exact import exact_groups
from moeflow.engine.regrouping.oracles.medoids import medoid_groups
from moeflow.engine.regrouping.search import Search, active_pairs, arrival_groups, regroup
from moeflow.errors import ConfigError
from moeflow.trace.convert import convert_trace
from moeflow.trace.trace import RoutingTrace


def test_more_tokens_than_it_counts_are_refused_and_none_have_no_groups():
    with pytest.raises(ConfigError, match="Allowed: 65535"):
        regroup(np.zeros((2**16, 1, 1), bool), 2)
    assert regroup(np.zeros((0, 2, 3), bool), 1).shape == (0,)


needs_c = pytest.mark.skipif(regroup_module._c_loop() is None, reason="the C loop was not built")


@needs_c
def test_arrays_of_another_search_are_refused():
    search = Search(random_routes(0, 9), 2)
    search.count = search.count[:1]
    with pytest.raises(ConfigError, match="compiled loop reads"):
        search.run(10)


def random_routes(seed, tokens, layers=3, experts=7, share=0.3):
    return np.random.default_rng(seed).random((tokens, layers, experts)) < share


def best_of_all(routes, num_groups):
    """The fewest active pairs of every split into groups of equal size."""
    tokens, size = len(routes), len(routes) // num_groups

    def splits(left):
        if not left:
            yield []
            return
        for others in itertools.combinations(left[1:], size - 1):
            group = (left[0], *others)
            for rest in splits([token for token in left if token not in group]):
                yield [group, *rest]

    return min(
        sum(int(routes[list(group)].any(axis=0).sum()) for group in split) for split in splits(list(range(tokens)))
    )


@needs_c
@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
def test_c_and_python_decide_alike_to_the_last_bit(monkeypatch, num_groups):
    routes = random_routes(1, 14)
    built = Search(routes, num_groups, seed=4)
    changes = built.run(1500)
    monkeypatch.setattr(regroup_module, "_c_loop", lambda: None)
    plain = Search(routes, num_groups, seed=4)
    assert plain.run(1500) == changes
    assert plain.random == built.random
    for name in ("group", "best", "any", "one", "count"):
        assert (getattr(plain, name) == getattr(built, name)).all(), name


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_what_is_kept_equals_what_the_groups_say(seed, tokens, num_groups):
    routes = random_routes(seed, tokens, layers=2, experts=40)
    num_groups = min(num_groups, tokens)
    search = Search(routes, num_groups, seed=seed)
    before = active_pairs(routes, search.group)
    sizes = np.bincount(search.group, minlength=num_groups)
    change = search.run(200)
    assert active_pairs(routes, search.best) == before + change <= before
    assert (np.bincount(search.best, minlength=num_groups) == sizes).all()
    again = Search(routes, num_groups, start=search.group)
    assert (again.count == search.count).all()
    assert (again.any == search.any).all()
    assert (again.one == search.one).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tokens", "num_groups"), [(8, 2), (9, 3), (8, 4)])
def test_search_and_program_find_the_best_of_all_splits_and_the_bound_is_below(seed, tokens, num_groups):
    routes = random_routes(seed, tokens)
    best = best_of_all(routes, num_groups)
    groups, proven = exact_groups(routes, num_groups)
    assert proven
    assert active_pairs(routes, groups) == best
    assert active_pairs(routes, regroup(routes, num_groups)) == best
    assert regroup_bound(routes, num_groups) <= best


@given(st.integers(0, 10**6), st.sampled_from([(6, 2), (6, 3), (8, 2), (8, 4)]), st.floats(0.05, 0.9))
@settings(max_examples=40, deadline=None)
def test_no_split_is_below_the_bound(seed, shape, share):
    routes = random_routes(seed, shape[0], share=share)
    assert regroup_bound(routes, shape[1], steps=20) <= best_of_all(routes, shape[1])


def test_two_kinds_of_token_are_told_apart_by_all_and_the_bound_is_tight():
    routes = np.zeros((16, 2, 8), bool)
    routes[::2, :, :4] = True
    routes[1::2, :, 4:] = True
    assert active_pairs(routes, arrival_groups(16, 2)) == 32
    for groups in (regroup(routes, 2), medoid_groups(routes, 2)):
        assert active_pairs(routes, groups) == 16
    assert regroup_bound(routes, 2) == 16


def test_the_same_seed_gives_the_same_groups_and_the_start_is_kept_where_nothing_is_gained():
    routes = random_routes(3, 24, layers=6, experts=16)
    assert (regroup(routes, 2, seed=1) == regroup(routes, 2, seed=1)).all()
    start = np.arange(24, dtype=np.int32) % 2
    assert (regroup(np.ones((24, 1, 2), bool), 2, start=start) == start).all()
    assert active_pairs(routes, regroup(routes, 2, start=start)) <= active_pairs(routes, start)


def test_sizes_differ_by_one_at_most_where_groups_do_not_divide_the_tokens():
    groups = regroup(random_routes(0, 11), 3)
    assert sorted(np.bincount(groups)) == [3, 4, 4]


def test_medoids_make_groups_of_equal_size():
    for num_groups in (1, 2, 4):
        groups = medoid_groups(random_routes(5, 16), num_groups)
        assert np.bincount(groups).tolist() == [16 // num_groups] * num_groups


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: regroup(np.ones((3, 4), bool), 1), "routes are bool"),
        (lambda: regroup(np.ones((3, 2, 2)), 1), "routes are float64"),
        (lambda: regroup(np.ones((3, 2, 2), bool), 4), "4 groups of 3 tokens"),
        (lambda: regroup(np.ones((3, 2, 2), bool), 0), "0 groups of 3 tokens"),
        (lambda: regroup(np.ones((3, 2, 2), bool), 2, start=[0, 1]), "the start is not a group"),
        (lambda: regroup(np.ones((3, 2, 2), bool), 2, start=[0, 1, 2]), "the start is not a group"),
        (lambda: medoid_groups(np.ones((6, 2, 2), bool), 3), "K-medoids halves"),
        (lambda: regroup_bound(np.ones((5, 2, 2), bool), 2), "5 tokens in 2 groups"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(ConfigError, match=says):
        call()


def test_no_tokens_and_tokens_without_experts_are_no_trouble():
    assert regroup(np.zeros((0, 2, 2), bool), 1).tolist() == []
    assert regroup(np.zeros((4, 2, 2), bool), 2).tolist() == [0, 0, 1, 1]
    assert regroup_bound(np.zeros((4, 2, 2), bool), 2) == 0


@pytest.mark.slow
def test_real_routes_activate_fewer_experts_than_by_medoids_or_arrival(data_folder, tmp_path):
    convert_trace(data_folder / "gpt_oss_20b", tmp_path / "t")
    trace = RoutingTrace.open(tmp_path / "t")
    rng, totals = np.random.default_rng(0), np.zeros(4)
    long = [rows for rows in trace.sequences() if rows.stop - rows.start >= 100]
    for _ in range(10):
        chosen = [long[i] for i in rng.choice(len(long), 32, replace=False)]
        experts = trace.experts[[rng.integers(rows.start, rows.stop) for rows in chosen]]
        routes = np.zeros((32, trace.num_layers, trace.num_experts), bool)
        np.put_along_axis(routes, experts.astype(int), True, 2)
        groups = arrival_groups(32, 2), medoid_groups(routes, 2), regroup(routes, 2)
        totals += *(active_pairs(routes, group) for group in groups), regroup_bound(routes, 2, steps=50)
    arrival, medoids, searched, bound = totals
    assert bound <= searched < medoids < arrival
    assert searched < 0.9 * arrival
