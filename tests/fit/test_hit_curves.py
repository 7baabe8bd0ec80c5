"""Hit rates of curves and traces."""

import itertools

import pytest

from helpers.link_traces import write_random_trace
from moeflow.errors import TraceError
from moeflow.fit.hit_curves import curve_for, curve_of_trace
from moeflow.fit.measured_curves import CURVES, RESIDENCIES
from moeflow.replay.demand import replay_trace
from moeflow.trace.trace import RoutingTrace


def test_nothing_hits_without_memory_and_everything_with_all_of_it():
    curve = curve_for(32, 4)
    assert tuple(curve.at(0)) == (0, 0, 0)
    assert tuple(curve.at(1)) == (1, 1, 1)


def test_rates_rise_with_the_share_and_lie_in_their_range():
    for shape in CURVES:
        curve = curve_for(*shape)
        rates = [curve.at(share / 100) for share in range(101)]
        assert all(low <= mid <= high for low, mid, high in rates)
        assert [rate.high for rate in rates] == sorted(rate.high for rate in rates)
        assert all(later.mid >= before.mid - 1e-9 for before, later in itertools.pairwise(rates))


def test_the_curve_is_that_of_the_measured_model_with_the_nearest_counts_and_says_which():
    assert "gpt-oss" in curve_for(32, 4).source
    assert "OLMoE" in curve_for(256, 8).source
    assert "the demo model (16 experts, top-2)" in curve_for(8, 2).source


def test_a_trace_gives_the_rates_of_its_replay(tmp_path):
    write_random_trace(file := tmp_path / "model.trace")
    trace = RoutingTrace.open(file)
    curve = curve_of_trace(file, (50.0, 75.0), of=(trace.num_layers, trace.num_experts, trace.top_k))
    for policy, warm, rates in (("lfru", False, curve.low), ("lfru", True, curve.mid), ("belady", True, curve.high)):
        assert [row["hit_rate"] for row in replay_trace(trace, [50, 75], [policy], warm=warm)] == list(rates)
    assert "model.trace" in curve.source


def test_a_trace_of_another_model_is_refused(tmp_path):
    write_random_trace(file := tmp_path / "model.trace")
    with pytest.raises(TraceError, match=r"and this one has \(3, 77, 2\)"):
        curve_of_trace(file, of=(3, 77, 2))


def test_measured_curves_have_a_rate_at_each_residency():
    assert all(len(rates) == len(RESIDENCIES) for _, *curves in CURVES.values() for rates in curves)
