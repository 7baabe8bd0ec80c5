"""The token scheduler: groups by likely routes, its own gain known exactly, and aside where nothing is gained."""

import threading

import numpy as np
import pytest

from moeflow.engine.regrouping.search import active_pairs, arrival_groups
from moeflow.engine.regrouping.token_scheduler import TokenScheduler, carried_groups
from moeflow.errors import ConfigError
from moeflow.predictors.odds import multi_hot

NAMES = [f"s{number}" for number in range(8)]
FED = list(range(100, 108))  # tokens that nobody has seen


def chosen_of(kinds):
    """[tokens, 2, 4] ids: kind 0 takes the lower experts, kind 1 the upper."""
    return np.broadcast_to(4 * np.array(kinds)[:, None, None] + np.arange(4), (len(kinds), 2, 4))


def routes_of(kinds):
    """The same as [tokens, 2, 8] bool."""
    return multi_hot(chosen_of(kinds), 8) > 0


KINDS = [0, 1, 0, 1, 0, 1, 0, 1]


@pytest.fixture
def scheduler():
    made = TokenScheduler(2, 8, 4, group_size=4)
    yield made
    made.close()


def seen(scheduler, kinds=KINDS):
    for name, chosen in zip(NAMES, chosen_of(kinds), strict=True):
        scheduler.observe(name, [0], chosen[None])


def test_sequences_of_one_kind_share_a_group_and_the_gain_is_known_exactly(scheduler):
    seen(scheduler)
    groups = scheduler.split(NAMES, FED)
    assert sorted(map(sorted, groups)) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    scheduler.finish(chosen_of(KINDS), step_s=1.0)
    assert (scheduler.stats.active, scheduler.stats.active_by_arrival) == (16, 32)


def test_gain_is_counted_on_true_routes_not_on_likely_ones(scheduler):
    seen(scheduler)
    groups = scheduler.split(NAMES, FED)
    true = routes_of([0, 0, 0, 0, 1, 1, 1, 1])  # arrival order would have been the best
    scheduler.finish(chosen_of([0, 0, 0, 0, 1, 1, 1, 1]), step_s=1.0)
    of = np.empty(8, int)
    for number, places in enumerate(groups):
        of[places] = number
    assert scheduler.stats.active == active_pairs(true, of) == 32
    assert scheduler.stats.active_by_arrival == active_pairs(true, arrival_groups(8, 2)) == 16


def test_every_sequence_is_in_one_group_of_at_most_the_size_and_sizes_differ_by_one():
    scheduler = TokenScheduler(2, 8, 4, group_size=3)
    for count in range(12):
        groups = scheduler.split([str(number) for number in range(count)], [0] * count)
        assert sorted(place for group in groups for place in group) == list(range(count))
        sizes = [len(group) for group in groups]
        assert not sizes or (max(sizes) <= 3 and max(sizes) - min(sizes) <= 1)
    scheduler.close()


def test_the_group_that_needs_what_is_resident_runs_first(scheduler):
    seen(scheduler)
    for kind in (0, 1):
        first = scheduler.split(NAMES, FED, routes_of([kind])[0])[0]
        assert {KINDS[place] for place in first} == {kind}


def test_consecutive_groups_share_with_one_another():
    scheduler = TokenScheduler(1, 12, 4, group_size=2)
    kinds = [[0, 1, 2, 3], [3, 4, 5, 11], [6, 7, 8, 9]]  # the first shares with the second, the third with memory
    for number, name in enumerate(NAMES[:6]):
        scheduler.observe(name, [0], np.array([[kinds[number % 3]]]))
    resident = np.isin(np.arange(12), [0, 1, 2, 6])[None]
    groups = scheduler.split(NAMES[:6], FED[:6], resident)
    assert [{place % 3 for place in group} for group in groups] == [{0}, {1}, {2}]
    scheduler.close()


def test_who_was_planned_for_stays_in_the_group_and_sizes_stay_equal():
    planned = dict(zip("abcdef", [1, 0, 1, 0, 1, 0], strict=True))
    assert carried_groups(planned, list("abcdef"), 2).tolist() == [1, 0, 1, 0, 1, 0]
    assert carried_groups(planned, list("acxe"), 2).tolist() == [1, 1, 0, 0]  # no room for the third
    assert carried_groups(planned | {"b": 2}, list("ba"), 2).tolist() == [0, 1]  # there is no third group now


def test_a_plan_made_ahead_is_amended_by_the_tokens_that_came_since(scheduler):
    for token, kind in ((1, 0), (2, 1)):
        scheduler.observe("earlier", [token] * 4, chosen_of([kind] * 4))
    scheduler.forget("earlier")
    scheduler.plan_ahead(NAMES, [None] * 8)
    fed = [1, 2, 2, 1, 2, 1, 1, 2]
    groups = scheduler.split(NAMES, fed)
    assert sorted(sorted(fed[place] for place in group) for group in groups) == [[1, 1, 1, 1], [2, 2, 2, 2]]


def test_a_plan_made_ahead_serves_whoever_goes_on_beside_whoever_comes(scheduler):
    seen(scheduler)
    scheduler.plan_ahead(NAMES, FED)
    later = [*NAMES[2:], "new", "newer"]
    groups = scheduler.split(later, FED)
    assert sorted(map(len, groups)) == [4, 4]
    kinds = dict(zip(NAMES, KINDS, strict=True))
    assert sorted(sorted(kinds.get(later[place], 2) for place in group) for group in groups) == [
        [0, 0, 0, 2],
        [1, 1, 1, 2],
    ]


def test_fewer_groups_than_planned_ahead_are_filled_all_the_same(scheduler):
    more = NAMES + [f"t{number}" for number in range(4)]
    scheduler.plan_ahead(more, list(range(12)))
    assert sorted(map(len, scheduler.split(NAMES, FED))) == [4, 4]


def test_where_nothing_is_gained_it_rests_ever_longer_and_groups_by_arrival(scheduler):
    same = chosen_of([0] * 8)
    planned = []
    for _ in range(200):
        seen(scheduler, [0] * 8)
        before = scheduler.stats.planned
        groups = scheduler.split(NAMES, FED)
        planned.append(scheduler.stats.planned > before)
        if not planned[-1]:
            assert groups == [[0, 1, 2, 3], [4, 5, 6, 7]]
        scheduler.finish(same, step_s=1.0)
    rests = [len(rest) for rest in "".join("x" if on else "." for on in planned).split("x") if rest]
    assert rests[:2] == [31, 63]
    assert sum(planned) <= 32


def test_where_waiting_costs_more_than_is_saved_it_rests_and_plans_nothing_ahead(scheduler):
    for _ in range(8):
        seen(scheduler)
        scheduler.split(NAMES, FED)
        scheduler.finish(chosen_of(KINDS), step_s=1e-9)
    planned, plan_s = scheduler.stats.planned, scheduler.stats.plan_s
    for _ in range(20):
        scheduler.plan_ahead(NAMES, FED)
        scheduler.split(NAMES, FED)
        scheduler.finish(chosen_of(KINDS), step_s=1e-9)
    scheduler.close()  # what was submitted has run
    assert (scheduler.stats.planned, scheduler.stats.plan_s) == (planned, plan_s) == (8, plan_s)


def test_routes_are_wanted_while_it_plans_and_shortly_before_it_plans_again(scheduler):
    wanted, planned = [], []
    for _ in range(60):
        seen(scheduler, [0] * 8)
        before = scheduler.stats.planned
        scheduler.split(NAMES, FED)
        planned.append(scheduler.stats.planned > before)
        wanted.append(scheduler.wants_routes)
        scheduler.finish(chosen_of([0] * 8), step_s=1.0)
    again = planned.index(True, 8)
    assert planned[:8] == [True] * 8
    assert wanted[:8] == [True] * 8
    assert wanted[8 : again + 1] == [False] * (again - 16) + [True] * 9
    arrival = TokenScheduler(2, 8, 4, group_size=4, regrouping=False)
    assert not arrival.wants_routes
    arrival.close()


def test_where_much_is_gained_it_never_rests(scheduler):
    for _ in range(100):
        seen(scheduler)
        scheduler.split(NAMES, FED)
        scheduler.finish(chosen_of(KINDS), step_s=1000.0)
    assert scheduler.stats.planned == 100


def test_off_means_arrival_and_no_planning():
    scheduler = TokenScheduler(2, 8, 4, group_size=4, regrouping=False)
    seen(scheduler)
    assert scheduler.split(NAMES, FED) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    scheduler.finish(chosen_of(KINDS), step_s=1.0)
    assert scheduler.stats.planned == 0
    scheduler.close()


def test_close_ends_the_thread_and_what_ended_is_forgotten():
    before = set(threading.enumerate())
    scheduler = TokenScheduler(2, 8, 4, group_size=4)
    seen(scheduler)
    scheduler.plan_ahead(NAMES, FED)
    assert len(scheduler._likely) == 8
    for name in NAMES:
        scheduler.forget(name)
    assert len(scheduler._likely) == 0
    scheduler.close()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("size", [0, -1, 1.5, "4", True])
def test_group_size_that_cannot_be_is_refused(size):
    with pytest.raises(ConfigError, match="group_size"):
        TokenScheduler(2, 8, 4, group_size=size)
