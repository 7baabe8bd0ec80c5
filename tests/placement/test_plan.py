"""Plans: the same from lists, mask and numbers, and a replica for each token as routing chooses it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeflow.errors import PlacementError
from moeflow.placement.plan import Plan, replica_of


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ((), "without experts"),
        ((((0,), ()),), "expert 1 of layer 0"),
        ((((0,), (1, 1)),), r"GPUs \[1, 1\]"),
        ((((0,), (2,)),), "from 0 to 1"),
        ((((0,), (-1,)),), "from 0 to 1"),
        ((((0,), (1,)), ((0,),)), "same number"),
    ],
)
def test_plan_that_cannot_be_is_refused(experts, says):
    with pytest.raises(PlacementError, match=says):
        Plan(2, experts)


def test_plan_reads_the_same_from_lists_mask_and_numbers():
    plan = Plan(3, (((2, 0), (1,)), ((1,), (2,))))
    assert plan.experts[0][0] == (0, 2)
    assert Plan.of_mask(plan.mask()) == plan
    assert Plan.of_gpus(3, np.array([[0, 1], [1, 2]])).experts == (((0,), (1,)), ((1,), (2,)))
    assert plan.num_replicas.tolist() == [[2, 1], [1, 1]]
    assert plan.copies().tolist() == [[1, 1, 1], [0, 1, 1]]
    assert plan.experts_of(0, 2) == [0]
    assert (plan.shares().sum(axis=2) == 1).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_assignments_are_those_of_routing_token_by_token(seed):
    rng = np.random.default_rng(seed)
    gpus, layers, experts = (int(rng.integers(1, 5)) for _ in range(3))
    mask = rng.random((layers, experts, gpus)) < 0.5
    mask[..., 0] |= ~mask.any(axis=2)
    plan, counts = Plan.of_mask(mask), rng.integers(0, 9, (gpus, layers, experts))
    expected = np.zeros((layers, gpus, gpus), int)
    for home in range(gpus):
        for layer in range(layers):
            for expert in range(experts):
                for index in range(counts[home, layer, expert]):
                    expected[layer, home, replica_of(plan.experts[layer][expert], home, index)] += 1
    assert (plan.assignments(counts) == expected).all()
