"""Rows of a replay on a machine: against the plain replay, and between the bounds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fake_predictor import random_routes
from helpers.link_traces import LINK, E, K, L, trace_of, write_random_trace
from moeflow.errors import ConfigError
from moeflow.replay.demand import replay_trace
from moeflow.replay.link import replay_link
from moeflow.replay.machine import replay_machine
from moeflow.trace.trace import RoutingTrace


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    return write_random_trace(tmp_path_factory.mktemp("machine") / "t")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.floats(7, 100))
def test_bounds_stand_in_their_order(seed, residency):
    trace = trace_of(*[random_routes(12, L, E, K, seed + place) for place in range(2)])
    share = {name: replay_machine(trace, residency, name, LINK) for name in ("lru", "belady", "best-order")}
    perfect = replay_machine(trace, residency, "forecast", LINK, predictor="clairvoyant")
    best = share["best-order"]
    assert share["lru"]["share"] <= share["belady"]["share"] + 1e-9
    assert max(share["belady"]["share"], perfect["share"]) <= best["share_at_most"] + 1e-9
    assert best["share"] <= best["share_at_most"] + 1e-9 <= 1 + 1e-6
    assert best["share"] >= share["belady"]["share"] - 1e-9
    for row in (*share.values(), perfect):
        assert row["hits"] + row["late"] + row["misses"] == row["accesses"] == 24 * L * K


def test_demand_rows_agree_with_the_plain_replay(trace_file):
    trace = RoutingTrace.open(trace_file)
    for plain in replay_trace(trace, [25, 50], ["lru", "lfu", "lfru", "belady"]):
        row = replay_machine(trace, plain["residency"], plain["policy"], LINK)
        assert {name: row[name] for name in plain} == plain
        linked = replay_link(trace, row["slots"], LINK, policy=row["policy"]) if row["policy"] == "lru" else row
        seconds = len(trace) * L * LINK.layer_s + linked["misses"] * LINK.copy_s
        assert row["tokens_per_s"] == pytest.approx(len(trace) / seconds)
        assert row["share"] == pytest.approx(linked["share"])


def test_unknown_policies_are_refused_in_python_too(trace_file):
    with pytest.raises(ConfigError, match="Allowed: lru"):
        replay_machine(RoutingTrace.open(trace_file), 50, "best", LINK)
