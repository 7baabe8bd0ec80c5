"""Rows of a replay on a machine: against the plain replay, between the bounds, and as a user asks for them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bench_prefetch
from helpers.fake_predictor import random_routes
from helpers.link_traces import LINK, E, K, L, trace_of
from moeflow.cli.main import main
from moeflow.errors import ConfigError
from moeflow.replay.clairvoyant import Clairvoyant, least_time_s, replay_best_order
from moeflow.replay.demand import replay, replay_trace
from moeflow.replay.link import LinkModel, replay_link
from moeflow.replay.machine import replay_machine, replayed_places
from moeflow.replay.measured import read_realised
from moeflow.trace.trace import RoutingTrace, TraceWriter

MACHINE = ["--link-gb-s", "1", "--expert-mb", "2", "--layer-ms", "3"]


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    """Six sequences of 12 to 17 tokens."""
    path = tmp_path_factory.mktemp("machine") / "t"
    trace = trace_of(*[np.sort(random_routes(12 + seed, L, E, K, seed)) for seed in range(6)])
    with TraceWriter(path, trace.format) as writer:
        rows = writer.new_rows(len(trace))
        for name in ("token_id", "sequence", "experts", "phase"):
            rows[name] = trace._field(name)
        writer.write(rows)
    return path


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


def test_a_clairvoyant_says_what_comes():
    routes = [random_routes(3, L, E, K, seed) for seed in (0, 1)]
    predictor = Clairvoyant(routes, E, num_steps=2)
    for sequence in routes:
        predictor.begin(1)
        for row in range(3):
            said = predictor.step(np.zeros(1))[0]
            for layer in range(L):
                assert set(np.flatnonzero(said[layer])) == set(sequence[row, layer])
            later = predictor.later()[0]
            assert later[0].any() == (row < 2)  # nothing after the end
            assert row == 2 or set(np.flatnonzero(later[0, 0])) == set(sequence[row + 1, 0])


def test_demand_rows_agree_with_the_plain_replay(trace_file):
    trace = RoutingTrace.open(trace_file)
    for plain in replay_trace(trace, [25, 50], ["lru", "lfu", "lfru", "belady"]):
        row = replay_machine(trace, plain["residency"], plain["policy"], LINK)
        assert {name: row[name] for name in plain} == plain
        linked = replay_link(trace, row["slots"], LINK, policy=row["policy"]) if row["policy"] == "lru" else row
        seconds = len(trace) * L * LINK.layer_s + linked["misses"] * LINK.copy_s
        assert row["tokens_per_s"] == pytest.approx(len(trace) / seconds)
        assert row["share"] == pytest.approx(linked["share"])


def replay_json(capsys, trace_file, *options):
    assert main(["trace", "replay", str(trace_file), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_adds_a_predictors_row_and_costs(trace_file, capsys):
    options = [*MACHINE, "--residency", "25,50", "--policy", "lru,best-order", "--predictor", "clairvoyant"]
    rows = replay_json(capsys, trace_file, *options)
    assert [row["policy"] for row in rows] == ["lru"] * 2 + ["best-order"] * 2 + ["forecast"] * 2
    trace = RoutingTrace.open(trace_file)
    for row in rows:
        predictor = "clairvoyant" if row["policy"] == "forecast" else None
        link = LinkModel(2_000_000, 1e9, 3e-3)
        assert row == replay_machine(trace, row["residency"], row["policy"], link, predictor=predictor)
    assert "prefetch" in rows[-1]


def test_a_predictor_is_measured_on_held_out_sequences_alone(trace_file, capsys):
    row = replay_json(capsys, trace_file, *MACHINE, "--residency", "50", "--predictor", "markov")[-1]
    assert row["tokens"] == 16  # the fifth sequence
    assert replayed_places(RoutingTrace.open(trace_file), "clairvoyant", None) == list(range(6))
    assert replayed_places(RoutingTrace.open(trace_file), None, 3, 1) == [2]
    assert replay_json(capsys, trace_file, "--hold-out", "3")[0]["accesses"] == (14 + 17) * L * K
    assert replay_json(capsys, trace_file, "--limit", "1")[0]["accesses"] == 12 * L * K


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--predictor", "markov"], "--predictor works on a machine. Give it: --link-gb-s"),
        (["--in-flight", "2"], "--in-flight works on a machine"),
        (["--layer-ms", "1"], "--layer-ms alone is no machine"),
        ([*MACHINE[:-1], "0"], "--layer-ms 0 is out of range"),
        ([*MACHINE[:-1], "nan"], "--layer-ms nan is out of range"),
        ([*MACHINE, "--warm"], "--warm does not go with --link-gb-s"),
        ([*MACHINE, "--per-layer"], "--per-layer does not go with"),
        ([*MACHINE, "--phase", "all"], "--phase all does not go with"),
        ([*MACHINE, "--in-flight", "2"], "without --predictor there are none"),
        ([*MACHINE, "--in-flight", "0", "--predictor", "markov"], "--in-flight 0 prefetches nothing"),
        ([*MACHINE, "--policy", "forecast"], "give a predictor"),
        ([*MACHINE, "--policy", "lru,best"], "policy 'best' is unknown. Allowed: lru, lfu"),
        ([*MACHINE, "--predictor", "markov", "--hold-out", "3"], "it knows some of those. Give 5"),
        ([*MACHINE, "--predictor", "lookahead"], "holds no lookahead"),
        ([*MACHINE, "--predictor", "markov", "--residency", "50,3"], "The minimum is 6.25 %"),
        ([*MACHINE, "--predictor", "absent"], "cannot be read as a predictor"),
        (["--limit", "0"], "a limit of 0 sequences replays nothing"),
        (["--hold-out", "7"], "too few to hold out every 7th"),
    ],
)
def test_options_that_do_not_go_together_are_refused(trace_file, capsys, options, told):
    assert main(["trace", "replay", str(trace_file), *options]) == 1
    assert told in capsys.readouterr().err


def test_unknown_policies_are_refused_in_python_too(trace_file):
    with pytest.raises(ConfigError, match="Allowed: lru"):
        replay_machine(RoutingTrace.open(trace_file), 50, "best", LINK)


def test_the_table_shows_costs(trace_file, capsys):
    assert main(["trace", "replay", str(trace_file), *MACHINE, "--residency", "50", "--predictor", "clairvoyant"]) == 0
    shown = capsys.readouterr().out
    assert "tok/s" in shown
    assert "clairvoyant" in shown


def test_bench_prefetch_prints_rows_and_writes_what_a_report_takes(trace_file, tmp_path, capsys):
    out = tmp_path / "realised.json"
    options = ["--trace", str(trace_file), "--predictor", "markov", "--residency", "25,50", "--realised-out", str(out)]
    bench_prefetch.main(options)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["policy"], row["residency"]): row for row in result["rows"]}
    assert set(rows) == {(policy, residency) for policy in bench_prefetch.POLICIES for residency in (25.0, 50.0)}
    assert all(0 < row["share"] <= 1 for row in rows.values())
    realised = read_realised(out)
    assert {row["policy"] for row in realised.rows} == {"forecast", "clairvoyant"}
    assert set(realised.wasted_bytes) == {"forecast", "clairvoyant"}
    assert "0" in realised.recall_by_distance["markov"]
