"""Topologies: machines that cannot be are refused, and presets put slow links between nodes."""

import math

import numpy as np
import pytest

from helpers.placement_parts import machine
from moeflow.errors import PlacementError
from moeflow.placement.topology import Gpu, Topology, preset


@pytest.mark.parametrize(
    ("field", "value"),
    [("memory_bytes", 0), ("memory_bytes", -1.0), ("memory_bytes", math.nan), ("flops_per_s", 0.0),
     ("flops_per_s", math.inf), ("memory_bytes_per_s", math.nan)],
)  # fmt: skip
def test_gpu_without_memory_or_speed_is_refused_by_name(field, value):
    good = {"memory_bytes": 1e9, "flops_per_s": 1e12, "memory_bytes_per_s": 1e11}
    cards = (Gpu(**good), Gpu(**{**good, field: value}))
    with pytest.raises(PlacementError, match=f"GPU 1 has {field}"):
        Topology("t", cards, np.ones((2, 2)))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_disconnected_topology_is_refused_and_the_pair_named(value):
    links = np.ones((3, 3))
    links[2, 1] = value
    with pytest.raises(PlacementError, match="not connected: GPU 2 to GPU 1"):
        Topology("t", machine(1, 1, 1).gpus, links)


def test_malformed_topologies_are_refused():
    cards = machine(1, 1).gpus
    with pytest.raises(PlacementError, match="no GPU"):
        Topology("t", (), np.ones((0, 0)))
    with pytest.raises(PlacementError, match=r"Give \[2, 2\]"):
        Topology("t", cards, np.ones((3, 3)))
    with pytest.raises(PlacementError, match="square of numbers"):
        Topology("t", cards, [[1, 2], [3]])
    with pytest.raises(PlacementError, match="neither a file nor known"):
        preset("ring", 4)
    with pytest.raises(PlacementError, match="odd"):
        preset("two-nodes", 3)
    with pytest.raises(PlacementError, match="1 or more"):
        preset("nvlink", 0)


def test_presets_put_slow_links_between_nodes_only():
    topology = preset("two-nodes", 4)
    links = topology.bandwidth_bytes_per_s
    assert topology.nodes == (0, 0, 1, 1)
    assert links[0, 1] == links[2, 3] > links[1, 2] == links[0, 3]
    assert preset("pcie", 1).num_gpus == 1
