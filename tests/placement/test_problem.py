"""Problems: slots by memory, plans refused that break them, the objective over workloads."""

import math

import numpy as np
import pytest

from helpers.placement_parts import STEP, machine, random_workload
from moeflow.errors import PlacementError
from moeflow.placement.cost import StepShape, judge
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem, Solution
from moeflow.placement.topology import Gpu, Topology
from moeflow.placement.workload import Workload


def test_slots_are_equal_where_memory_allows_and_others_take_more_where_not():
    workload = random_workload(0, 2, 10)
    problem = Problem([workload], machine(1, 1, 1, 1), STEP)
    assert problem.slots.tolist() == [3, 3, 3, 3]
    assert Problem([workload], machine(1, 1, 1, 1), STEP, num_replicas=6).slots.tolist() == [4, 4, 4, 4]
    cards = tuple(Gpu(memory, 1.0, 1.0) for memory in (2 * 1000 * 1, 2 * 1000 * 20, 2 * 1000 * 4.9))
    tight = Problem([workload], Topology("t", cards, np.ones((3, 3))), STEP)
    assert tight.slots.tolist() == [1, 5, 4]


def test_problems_without_a_plan_are_refused():
    workload = random_workload(0)
    with pytest.raises(PlacementError, match="no workload"):
        Problem([], machine(1, 1), STEP)
    with pytest.raises(PlacementError, match="counts of one model"):
        Problem([workload, random_workload(0, 3, 6)], machine(1, 1), STEP)
    with pytest.raises(PlacementError, match="ask for communication by dispatch"):
        Problem([workload, Workload("other", workload.load)], machine(1, 1), STEP)
    with pytest.raises(PlacementError, match="hold 4 experts of each layer, and 5 are to be placed"):
        Problem([workload], machine(1, 1, memory=3 * 1000 * 2.5), STEP)
    with pytest.raises(PlacementError, match="at most 5 GPUs"):
        Problem([workload], machine(*[1] * 6), STEP)
    assert Problem([workload], machine(*[1] * 6), STEP, num_replicas=1).slots.tolist() == [1] * 6
    with pytest.raises(PlacementError, match="Give 0 or more"):
        Problem([workload], machine(1, 1), STEP, num_replicas=-1)
    with pytest.raises(PlacementError, match="room for 5"):
        Problem([workload], machine(1, 1), STEP, num_replicas=6)


def test_plan_beyond_the_slots_is_refused_by_gpu_and_layer():
    problem = Problem([random_workload(0)], machine(1, 1), STEP)
    problem.check(Plan.of_gpus(2, np.array([[0, 0, 0, 1, 1]] * 3)))
    with pytest.raises(PlacementError, match="4 experts of layer 1 on GPU 0, which has 3 slots"):
        problem.check(Plan.of_gpus(2, np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 1, 1]])))


def test_plan_with_more_copies_than_experts_and_replicas_is_refused_though_slots_are_free():
    problem = Problem((random_workload(0),), machine(1, 1), StepShape())
    assert problem.slots.tolist() == [3, 3]  # for 5 experts
    experts = (((0,), (0,), (0, 1), (1,), (1,)), *((((0,), (0,), (0,), (1,), (1,)),) * 2))
    with pytest.raises(PlacementError, match=r"6 copies in layer 0, and 5 are allowed: 5 experts and 0 replicas"):
        problem.check(Plan(2, experts))


def test_objective_is_the_mean_of_the_workloads_or_the_worst():
    workloads, plan = [random_workload(seed) for seed in range(3)], Plan.of_gpus(2, np.array([[0, 0, 1, 1, 0]] * 3))
    topology = machine(500, 200)
    seconds = [judge(plan, workload, topology, STEP).step_s for workload in workloads]
    assert Problem(workloads, topology, STEP).objective(plan) == pytest.approx(np.mean(seconds))
    assert Problem(workloads, topology, STEP, worst_case=True).objective(plan) == max(seconds)


def test_gap_is_relative_to_the_bound():
    def gap(objective, bound):
        return Solution("s", Plan(1, (((0,),),)), objective, bound, "balance", 0.0, "feasible").gap

    assert gap(1.2, 1.0) == pytest.approx(0.2)
    assert gap(1.0, 1.0) == 0
    assert gap(1.0, 0.0) == math.inf
