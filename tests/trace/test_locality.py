"""Reuse and demand are counted within sequences and layers, and padding is no demand."""

import numpy as np
import pytest

from moeflow.trace.locality import demand_by_expert, measure_locality


def test_reuse_is_counted_within_sequences_and_layers():
    first, second = [[[0, 1], [4, 5]], [[0, 2], [4, 5]], [[0, 1], [6, 7]]], [[[0, 5], [6, 7]], [[0, 1], [4, 5]]]
    locality = measure_locality(np.array(first + second), np.array([0, 3, 5]), (8, 8), distances=(1, 2))
    # Three rows have a token before them: 12 demands, of which 0, 4, 5, 0 and 0 come back at once, 1 from two back.
    assert locality.reuse == {1: 5 / 12, 2: 6 / 12}
    assert locality.chance[1] == pytest.approx(1 / 4)
    assert locality.chance[2] == pytest.approx((8 * 1 / 4 + 4 * (1 - 0.75**2)) / 12)
    assert locality.hottest_quarter.tolist() == [8 / 10, 6 / 10]
    assert locality.idle == 4 + 4


def test_demand_leaves_out_padding_and_experts_that_do_not_exist():
    demand = demand_by_expert(np.array([[[0, 1], [0, 255]], [[2, 1], [1, 0]]]), (3, 2))
    np.testing.assert_array_equal(demand, [[1, 2, 1], [2, 1, np.nan]])
