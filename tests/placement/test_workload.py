"""Workloads: counts that cannot be are refused, and routes are counted as a loop counts them."""

import math

import numpy as np
import pytest

from moeflow.errors import PlacementError
from moeflow.placement.workload import Workload


@pytest.mark.parametrize(
    ("load", "says"),
    [
        ([1, 2, 3], r"shape \[3\]"),
        (np.empty((0, 4)), "none of them 0"),
        ([[1, 2], [3]], "equally long"),
        ([[1, 2], [3, -1]], r"\[1, 1\] is -1"),
        ([[1, math.nan]], "nan"),
        ([[1, math.inf]], "inf"),
        ([["a", "b"]], "not an array of numbers"),
        ([[1, 2], [0, 0]], "row 1"),
    ],
)
def test_counts_that_cannot_be_are_refused(load, says):
    with pytest.raises(PlacementError, match=says):
        Workload("w", load)


@pytest.mark.parametrize("name", ["transitions", "coactivation"])
def test_pair_counts_of_a_wrong_shape_or_sign_are_refused(name):
    with pytest.raises(PlacementError, match=name):
        Workload("w", np.ones((3, 4)), **{name: np.ones((3, 4, 5))})
    right = (2, 4, 4) if name == "transitions" else (3, 4, 4)
    with pytest.raises(PlacementError, match=rf"{name} at \[0, 0, 0\]"):
        Workload("w", np.ones((3, 4)), **{name: -np.ones(right)})


def test_dense_layers_before_all_others_are_left_out_and_counted():
    load = np.array([[0, 0], [0, 0], [1, 3], [2, 2]])
    workload = Workload.of_counts("w", load)
    assert workload.first_layer == 2
    assert workload.shape == (2, 2)
    with pytest.raises(PlacementError, match="no load"):
        Workload.of_counts("w", np.array([[1, 3], [0, 0], [2, 2]]))
    with pytest.raises(PlacementError, match="no load"):
        Workload.of_counts("w", np.zeros((2, 2)))


def test_routes_are_counted_like_a_loop_counts_them():
    rng = np.random.default_rng(0)
    routes = np.stack([rng.permutation(6)[:3] for _ in range(40 * 4)]).reshape(40, 4, 3)
    routes[rng.random(routes.shape) < 0.1] = 255  # none
    workload = Workload.of_routes("w", routes, 6)
    load, following, together = np.zeros((4, 6)), np.zeros((3, 6, 6)), np.zeros((4, 6, 6))
    for token in routes.tolist():
        for layer, experts in enumerate(token):
            for one in experts:
                if one == 255:
                    continue
                load[layer, one] += 1
                for other in experts:
                    if other not in (255, one):
                        together[layer, one, other] += 1
                if layer + 1 < 4:
                    for after in token[layer + 1]:
                        if after != 255:
                            following[layer, one, after] += 1
    assert (workload.load == load).all()
    assert (workload.transitions == following).all()
    assert (workload.coactivation == together).all()
    assert workload.top_k == 3
