"""Exports: each engine's reader rebuilds the placement, and tokens shared over copies go where the plan sends them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.export_readers import read_eplb, read_ranks, read_sglang
from moeflow.errors import PlacementError
from moeflow.placement.files.exports import eplb_maps, export_plan, physical_to_logical
from moeflow.placement.plan import Plan

EVEN = Plan.of_gpus(2, np.array([[0, 0, 1, 1], [1, 0, 1, 0]]))
REPLICATED = Plan(2, (((0, 1), (0,), (1,), (0, 1)), ((0,), (0, 1), (0, 1), (1,))))
UNEVEN = Plan(3, (((0,), (0, 2), (1,), (2,), (2,)), ((2,), (1,), (0, 1, 2), (0,), (0,))))
PLANS = {"even": EVEN, "replicated": REPLICATED, "uneven": UNEVEN}


def round_trip(plan, folder, first_layer=2):
    """What each export's reader makes of a plan."""
    load = np.random.default_rng(0).random((plan.num_layers, plan.num_experts))
    for kind, name in (("sglang", "s.json"), ("eplb", "e.json"), ("eplb", "e.npz"), ("npz", "r.npz")):
        export_plan(kind, folder / name, plan, load=load, first_layer=first_layer)
    yield read_sglang(folder / "s.json", plan.num_gpus, plan.num_experts, first_layer=first_layer)
    yield read_eplb(folder / "e.json", plan.num_gpus)
    yield read_eplb(folder / "e.npz", plan.num_gpus)
    yield read_ranks(folder / "r.npz")


@pytest.mark.parametrize("name", PLANS)
def test_every_export_is_read_as_the_same_placement(tmp_path, name):
    assert list(round_trip(PLANS[name], tmp_path)) == [PLANS[name]] * 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["e.json", "e.npz", "r.npz", "s.json"]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_placement_that_leaves_no_gpu_empty_survives(tmp_path_factory, data):
    num_gpus, num_experts = data.draw(st.integers(1, 4)), data.draw(st.integers(4, 7))
    gpus = st.sets(st.integers(0, num_gpus - 1), min_size=1)
    layers = st.lists(gpus, min_size=num_experts, max_size=num_experts).filter(
        lambda layer: set().union(*layer) == set(range(num_gpus))
    )
    drawn = data.draw(st.lists(layers, min_size=1, max_size=3))
    plan = Plan(num_gpus, tuple(tuple(tuple(gpus) for gpus in layer) for layer in drawn))
    assert list(round_trip(plan, tmp_path_factory.mktemp("exports"))) == [plan] * 4


def test_sglang_has_a_row_for_every_layer_of_the_model(tmp_path):
    told = export_plan("sglang", tmp_path / "s.json", REPLICATED, first_layer=3)
    content = json.loads((tmp_path / "s.json").read_text())
    assert list(content) == ["physical_to_logical_map"]
    rows = content["physical_to_logical_map"]
    assert rows[:3] == [[0, 1, 2, 3, 0, 1]] * 3
    assert rows[3:] == [[0, 1, 3, 0, 2, 3], [0, 1, 2, 1, 2, 3]]
    assert told == {"num_physical_experts": 6, "num_redundant_experts": 2, "num_filled": 0}


def test_eplb_maps_are_each_others_inverse_as_rebalance_experts_returns_them():
    maps = eplb_maps(np.array([[0, 1, 3, 0, 2, 3]]), 4)
    assert maps["physical_to_logical_map"].tolist() == [[0, 1, 3, 0, 2, 3]]
    assert maps["logical_to_physical_map"].tolist() == [[[0, 3], [1, -1], [4, -1], [2, 5]]]
    assert maps["logical_replica_count"].tolist() == [[2, 1, 1, 2]]


def test_ranks_are_padded_with_minus_one(tmp_path):
    export_plan("npz", tmp_path / "r.npz", REPLICATED)
    with np.load(tmp_path / "r.npz") as arrays:
        assert arrays["ranks"].dtype == np.int32
        assert arrays["ranks"][0].tolist() == [[0, 1], [0, -1], [1, -1], [0, 1]]
        assert arrays["num_replicas"].tolist() == [[2, 1, 1, 2], [1, 2, 2, 1]]


def test_free_slots_hold_the_gpus_most_loaded_expert_that_is_nowhere_else():
    plan = Plan(2, (((0, 1), (0,), (0,), (1,)),))
    # GPU 1 has a slot free: expert 0 has more load, but a copy of it more would draw tokens from GPU 0.
    assert physical_to_logical(plan, np.array([[9, 1, 1, 5]])).tolist() == [[0, 1, 2, 0, 3, 3]]
    plan = Plan.of_gpus(2, np.array([[0, 0, 0, 0, 1, 1]]))
    assert physical_to_logical(plan, np.array([[1, 1, 1, 1, 2, 5]])).tolist() == [[0, 1, 2, 3, 4, 5, 5, 4]]


def test_equal_shares_over_slots_send_each_gpu_what_the_plan_does():
    for plan in PLANS.values():
        physical = physical_to_logical(plan)
        counts = eplb_maps(physical, plan.num_experts)["logical_replica_count"]
        gpus = np.arange(physical.shape[1]) // (physical.shape[1] // plan.num_gpus)
        shares = np.zeros((plan.num_layers, plan.num_experts, plan.num_gpus))
        for layer, row in enumerate(physical):
            np.add.at(shares[layer], (row, gpus), 1 / counts[layer, row])
        np.testing.assert_allclose(shares, plan.shares())


def test_a_gpu_too_small_for_the_engines_equal_slots_is_named(tmp_path):
    told = r"wants 3 slots of every layer on each GPU, and GPU 1 has memory for 2"
    for kind, name in (("sglang", "a.json"), ("eplb", "a.npz")):
        with pytest.raises(PlacementError, match=told):
            export_plan(kind, tmp_path / name, UNEVEN, most=np.array([3, 2, 3]))
    export_plan("npz", tmp_path / "a.npz", UNEVEN, most=np.array([3, 2, 3]))


def test_a_gpu_without_experts_suits_no_engine(tmp_path):
    plan = Plan.of_gpus(3, np.array([[0, 1, 0, 1]]))
    with pytest.raises(PlacementError, match="leaves GPU 2 without an expert of layer 0"):
        export_plan("eplb", tmp_path / "a.json", plan)
    export_plan("npz", tmp_path / "a.npz", plan)
    assert read_ranks(tmp_path / "a.npz") == plan


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("vllm", "a.json", "Allowed: sglang, eplb, npz"),
        ("sglang", "a.npz", r"must end in \.json"),
        ("npz", "a.json", r"must end in \.npz"),
        ("eplb", "a.pt", r"must end in \.json or \.npz"),
        ("sglang", "nowhere/a.json", "cannot be written"),
    ],
)
def test_a_bad_export_is_refused_and_writes_nothing(tmp_path, kind, name, told):
    with pytest.raises(PlacementError, match=told):
        export_plan(kind, tmp_path / name, EVEN)
    assert not list(tmp_path.iterdir())


def test_readers_refuse_what_the_engine_would(tmp_path):
    export_plan("sglang", tmp_path / "s.json", REPLICATED)
    for num_gpus, num_experts, told in ((4, 4, "does not give each of 4 GPUs"), (2, 3, "outside 0 to 2")):
        with pytest.raises(PlacementError, match=told):
            read_sglang(tmp_path / "s.json", num_gpus, num_experts)
    with pytest.raises(PlacementError, match="expert 4 of layer 0 on GPUs"):
        read_sglang(tmp_path / "s.json", 2, 5)
    maps = {name: array.tolist() for name, array in eplb_maps(physical_to_logical(REPLICATED), 4).items()}
    for change, told in (
        ({"logical_replica_count": [[2, 1, 1, 1], [1, 2, 2, 1]]}, "not the inverse"),
        ({"logical_to_physical_map": [[[1, 0]] * 4] * 2}, "not the inverse"),
        ({"logical_replica_count": [[1]]}, "different shapes"),
        ({"physical_to_logical_map": [[0.5]]}, "whole numbers"),
    ):
        (tmp_path / "e.json").write_text(json.dumps(maps | change))
        with pytest.raises(PlacementError, match=told):
            read_eplb(tmp_path / "e.json", 2)
    (tmp_path / "bad.npz").write_bytes(b"PK")
    for name, told in (("absent.json", "cannot be read"), ("s.json", "not an export"), ("bad.npz", "not an export")):
        with pytest.raises(PlacementError, match=told):
            read_ranks(tmp_path / name)
