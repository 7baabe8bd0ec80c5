"""The token scheduler: groups by likely routes, its own gain known exactly, and aside where nothing is gained."""

import threading

import numpy as np
import pytest

from moeflow.errors import ConfigError
from moeflow.recent_routes import RecentRoutes
from moeflow.regroup import active_pairs, arrival_groups
from moeflow.scheduler import TokenScheduler

NAMES = [f"s{number}" for number in range(8)]


def routes_of(kinds):
    """[tokens, 2, 8] bool: kind 0 takes the lower experts, kind 1 the upper."""
    out = np.zeros((len(kinds), 2, 8), bool)
    for token, kind in enumerate(kinds):
        out[token, :, 4 * kind : 4 * kind + 4] = True
    return out


KINDS = [0, 1, 0, 1, 0, 1, 0, 1]


@pytest.fixture
def scheduler():
    made = TokenScheduler(2, 8, 4, group_size=4)
    yield made
    made.close()


def seen(scheduler, kinds=KINDS):
    for name, routes in zip(NAMES, routes_of(kinds), strict=True):
        scheduler.observe(name, routes[None])


def test_sequences_of_one_kind_share_a_group_and_the_gain_is_known_exactly(scheduler):
    seen(scheduler)
    groups = scheduler.split(NAMES)
    assert sorted(map(sorted, groups)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    scheduler.finish(routes_of(KINDS), step_s=1.0)
    assert (scheduler.stats.active, scheduler.stats.active_by_arrival) == (16, 32)


def test_gain_is_counted_on_true_routes_not_on_likely_ones(scheduler):
    seen(scheduler)
    groups = scheduler.split(NAMES)
    true = routes_of([0, 0, 0, 0, 1, 1, 1, 1])  # arrival order would have been the best
    scheduler.finish(true, step_s=1.0)
    of = np.empty(8, int)
    for number, places in enumerate(groups):
        of[places] = number
    assert scheduler.stats.active == active_pairs(true, of) == 32
    assert scheduler.stats.active_by_arrival == active_pairs(true, arrival_groups(8, 2)) == 16


def test_every_sequence_is_in_one_group_of_at_most_the_size_and_sizes_differ_by_one():
    scheduler = TokenScheduler(2, 8, 4, group_size=3)
    for count in range(12):
        groups = scheduler.split([str(number) for number in range(count)])
        assert sorted(place for group in groups for place in group) == list(range(count))
        sizes = [len(group) for group in groups]
        assert not sizes or (max(sizes) <= 3 and max(sizes) - min(sizes) <= 1)
    scheduler.close()


def test_the_group_that_needs_what_is_resident_runs_first(scheduler):
    seen(scheduler)
    for kind in (0, 1):
        first = scheduler.split(NAMES, routes_of([kind])[0])[0]
        assert {KINDS[place] for place in first} == {kind}


def test_a_plan_made_ahead_serves_the_same_sequences_only(scheduler):
    seen(scheduler)
    scheduler.plan_ahead(NAMES)
    seen(scheduler, [0, 0, 0, 0, 1, 1, 1, 1])
    seen(scheduler, [0, 0, 0, 0, 1, 1, 1, 1])
    ahead = scheduler.split(NAMES)
    assert sorted(map(sorted, ahead)) == [[0, 2, 4, 6], [1, 3, 5, 7]]  # as was known then
    scheduler.plan_ahead(NAMES)
    assert len(scheduler.split(NAMES[:6])) == 2
    assert sorted(map(sorted, scheduler.split(NAMES))) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_where_nothing_is_gained_it_rests_ever_longer_and_groups_by_arrival(scheduler):
    same = routes_of([0] * 8)
    planned = []
    for _ in range(200):
        seen(scheduler, [0] * 8)
        before = scheduler.stats.planned
        groups = scheduler.split(NAMES)
        planned.append(scheduler.stats.planned > before)
        if not planned[-1]:
            assert groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
        scheduler.finish(same, step_s=1.0)
    rests = [len(rest) for rest in "".join("x" if on else "." for on in planned).split("x") if rest]
    assert rests[:2] == [31, 63]
    assert sum(planned) <= 32


def test_where_much_is_gained_it_never_rests(scheduler):
    for _ in range(100):
        seen(scheduler)
        scheduler.split(NAMES)
        scheduler.finish(routes_of(KINDS), step_s=1000.0)
    assert scheduler.stats.planned == 100


def test_off_means_arrival_and_no_planning():
    scheduler = TokenScheduler(2, 8, 4, group_size=4, regrouping=False)
    seen(scheduler)
    assert scheduler.split(NAMES) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    scheduler.finish(routes_of(KINDS), step_s=1.0)
    assert scheduler.stats.planned == 0
    scheduler.close()


def test_close_ends_the_thread_and_what_ended_is_forgotten():
    before = set(threading.enumerate())
    scheduler = TokenScheduler(2, 8, 4, group_size=4)
    seen(scheduler)
    scheduler.plan_ahead(NAMES)
    assert len(scheduler._recent) == 8
    for name in NAMES:
        scheduler.forget(name)
    assert len(scheduler._recent) == 0
    scheduler.close()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("size", [0, -1, 1.5, "4", True])
def test_group_size_that_cannot_be_is_refused(size):
    with pytest.raises(ConfigError, match="group_size"):
        TokenScheduler(2, 8, 4, group_size=size)


def test_recent_uses_count_more_than_old_ones_and_many_at_once_as_one_by_one():
    routes = np.random.default_rng(0).random((9, 3, 10)) < 0.3
    at_once, one_by_one = RecentRoutes(3, 10, 2), RecentRoutes(3, 10, 2)
    at_once.observe("a", routes)
    for token in routes:
        one_by_one.observe("a", token[None])
    assert (at_once.likely(["a"]) == one_by_one.likely(["a"])).all()
    assert at_once.likely(["a"]).sum(axis=2).max() <= 3
    recent = RecentRoutes(1, 4, 1)
    recent.observe("b", np.eye(4, dtype=bool)[[0, 1, 2, 3, 3]][:, None])
    assert recent.likely(["b"])[0, 0].tolist() == [False, False, True, True]


def test_nothing_is_likely_of_a_sequence_that_was_never_seen():
    assert not RecentRoutes(2, 4, 2).likely(["new"]).any()
