"""The best order of copies known stands between the best there is and the bound that its authors prove."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.replay.best_order import least_time_s, replay_best_order
from moeflow.replay.demand import replay
from moeflow.replay.link import LinkModel


def exhaustive_time_s(events, num_slots, link):
    """Try every order of copies and every eviction: the least seconds. Time goes in quarters of a second."""
    layer, copy = round(link.layer_s * 4), round(link.copy_s * 4)
    keys = sorted({key for event in events for key in event})
    states = {(0, 0, frozenset(), None)}
    # A state: (event, how much of it is computed, who is resident, (key, time left) on the link or None)
    for now in range(1, 10_000):
        following = set()
        for place, computed, resident, link_job in states:
            needed = set(events[place])
            pinned = needed & resident
            starts = [link_job]
            if link_job is None:
                starts = [None]
                for key in keys:
                    if key not in resident:
                        if len(resident) < num_slots:
                            starts.append((key, copy, None))
                        starts += [(key, copy, victim) for victim in resident - pinned]
            for start in starts:
                kept, job = resident, start
                if start is not None and len(start) == 3:
                    kept, job = resident - {start[2]}, start[:2]
                done = computed + 1 if needed <= resident else 0
                if job is not None:
                    job = (job[0], job[1] - 1)
                    if job[1] == 0:
                        kept, job = kept | {job[0]}, None
                if done == layer:
                    if place + 1 == len(events):
                        return now / 4
                    following.add((place + 1, 0, kept, job))
                else:
                    following.add((place, done, kept, job))
        states = following
    raise AssertionError("no order of copies ends")


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 2)]))
def test_the_best_order_is_close_to_the_best_there_is(seed, times):
    """By exhaustion on tiny sequences: never better, and within the bound that its authors prove."""
    rng = np.random.default_rng(seed)
    copy_s, layer_s = times[0] / 4, times[1] / 4
    link = LinkModel(1, 1 / copy_s, layer_s)
    routes = rng.integers(0, 3, (3, 2, 1))
    events = [[layer * 3 + int(row[layer, 0])] for row in routes for layer in range(2)]
    best_s = exhaustive_time_s(events, 2, link)
    found_s = replay_best_order(routes, 3, 2, link)["seconds"]
    misses = replay(routes, 3, np.array([0, 3]), 2, "belady")
    assert least_time_s(3, 2, misses.accesses - misses.hits, link) <= best_s + 1e-9
    assert best_s - 1e-9 <= found_s <= best_s * (1 + np.ceil(copy_s / layer_s) / 2) + 1e-9
