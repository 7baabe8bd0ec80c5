"""The integer program of small placements, against every plan there is."""

import functools
import sys

import numpy as np
import pytest

from helpers.placement_problems import machine, plans_within, random_problem
from moeflow.placement.cost import StepShape
from moeflow.placement.problem import Problem
from moeflow.placement.solvers.baselines import greedy, random_placement
from moeflow.placement.solvers.exact import exact, is_small
from moeflow.placement.solvers.joint import joint
from moeflow.placement.topology import Gpu, Topology, preset
from moeflow.placement.workload import Workload

UNEQUAL = Topology("unequal", (Gpu(1e12, 1e6, 1e6), Gpu(1e12, 3e6, 2e6)), np.array([[1, 2e5], [5e4, 1]]))
TIGHT = Topology(
    "tight", (Gpu(2 * 1.0 * 12288, 1e6, 1e6), Gpu(1e12, 1e6, 1e6)), np.full((2, 2), 1e5)
)  # one expert a layer on the first GPU


def small_problem(topology, num_experts, num_replicas=0, *, communication="path", workloads=1, worst=False, seed=0):
    """Two layers in which compute, reading, and links all weigh."""
    rng = np.random.default_rng(seed)
    shape = (2, num_experts)
    counts = [
        Workload(f"w{name}", rng.gamma(0.7, size=shape) + 0.05, rng.gamma(0.5, size=(1, num_experts, num_experts)))
        for name in range(workloads)
    ]
    step = StepShape(20.0, 2000, 12288, 12288, communication)
    return Problem(counts, topology, step, num_replicas, worst)


def two_nodes():
    """Four GPUs, slower links between two and two."""
    nodes = np.array([0, 0, 1, 1])
    cards = tuple(Gpu(1e12, 1e6, 1e6, int(node)) for node in nodes)
    return Topology("nodes", cards, np.where(nodes[:, None] == nodes, 1e5, 1e4))


def least(problem):
    """The objective of the best plan with no more replicas than asked for."""
    plans = plans_within(problem.slots, problem.num_layers, problem.num_experts)
    copies = problem.num_experts + problem.num_replicas
    return min(problem.objective(plan) for plan in plans if (plan.num_replicas.sum(axis=1) <= copies).all())


SMALL = {
    "by path": small_problem(machine(1, 1), 6),
    "by dispatch": small_problem(machine(1, 1), 6, communication="dispatch"),
    "by path, a replica": small_problem(machine(1, 1), 5, 1),
    "by path, two replicas": small_problem(machine(1, 1), 4, 2),
    "by dispatch, a replica": small_problem(machine(1, 1), 5, 1, communication="dispatch"),
    "slow links": small_problem(Topology("slow", machine(1, 1).gpus, np.full((2, 2), 1e5)), 6),
    "slow links, a replica": small_problem(Topology("slow", machine(1, 1).gpus, np.full((2, 2), 1e5)), 5, 1),
    "three GPUs, a replica": small_problem(machine(1, 1, 2), 3, 1),
    "unequal": small_problem(UNEQUAL, 6),
    "unequal, a replica": small_problem(UNEQUAL, 5, 1),
    "unequal by dispatch": small_problem(UNEQUAL, 6, communication="dispatch"),
    "memory for one": small_problem(TIGHT, 5),
    "two workloads": small_problem(UNEQUAL, 6, workloads=2),
    "two workloads, the worst": small_problem(UNEQUAL, 6, workloads=2, worst=True),
    "the worst by dispatch": small_problem(UNEQUAL, 5, workloads=2, worst=True, communication="dispatch"),
    "the worst with a replica": small_problem(UNEQUAL, 4, 1, workloads=2, worst=True),
    "two nodes": small_problem(two_nodes(), 4),
    "two nodes by dispatch": small_problem(two_nodes(), 4, communication="dispatch"),
    "two nodes, preset": small_problem(preset("two-nodes", 2), 6),
    "eight experts": small_problem(Topology("slow", machine(1, 1).gpus, np.full((2, 2), 1e5)), 8),
}


@functools.cache
def least_of(name):
    return least(SMALL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_exact_is_the_best_of_every_plan_and_proves_it(name):
    problem = SMALL[name]
    assert is_small(problem)
    found = exact(problem, start=random_placement(problem).plan)
    problem.check(found.plan)
    copies = problem.num_experts + problem.num_replicas
    assert (found.plan.num_replicas.sum(axis=1) <= copies).all()
    best = least_of(name)
    assert problem.objective(found.plan) == pytest.approx(best, rel=1e-5)
    assert found.bound == pytest.approx(best, rel=1e-5)
    solution = joint(problem)
    assert solution.status == "optimal"
    assert solution.gap <= 1.1e-6
    assert solution.objective == pytest.approx(best, rel=1e-5)


@pytest.mark.slow
def test_the_problems_above_are_not_solved_by_packing():
    # Else they would show nothing: where greedy is the best there is nothing to find.
    missed = [
        name for name, problem in SMALL.items() if problem.objective(greedy(problem).plan) > 1.001 * least_of(name)
    ]
    assert len(missed) > len(SMALL) / 2


@pytest.mark.parametrize("seed", [0, 2, 5, 11, 14])
def test_exact_is_the_best_of_every_plan_of_random_problems(seed):
    problem = random_problem(seed, experts=(2, 5), gpus=(2, 3), layers=(2, 3))
    found, best = exact(problem, start=random_placement(problem).plan), least(problem)
    assert problem.objective(found.plan) == pytest.approx(best, rel=1e-5)
    assert found.bound == pytest.approx(best, rel=1e-5)


def test_exact_is_the_same_by_cbc(monkeypatch):
    monkeypatch.setitem(sys.modules, "highspy", None)  # as if not installed
    problem = SMALL["slow links"]
    found, best = exact(problem, start=random_placement(problem).plan), least_of("slow links")
    assert problem.objective(found.plan) == pytest.approx(best, rel=1e-5)
    assert found.bound == pytest.approx(best, rel=1e-5)


def test_start_that_is_best_already_is_met():
    problem = SMALL["slow links"]
    best = exact(problem, start=random_placement(problem).plan)
    again = exact(problem, start=best.plan)
    assert problem.objective(again.plan) == pytest.approx(problem.objective(best.plan), rel=1e-6)


@pytest.mark.slow
def test_program_without_time_gives_the_start_and_claims_nothing_that_is_not_so():
    problem = SMALL["eight experts"]
    start = greedy(problem).plan
    found = exact(problem, start=start, time_limit_s=0.0)
    problem.check(found.plan)
    assert problem.objective(found.plan) <= problem.objective(start) * (1 + 1e-6)
    assert found.bound <= least_of("eight experts") * (1 + 1e-6)


def test_small_is_what_few_products_say():
    step = StepShape()
    load = {experts: Workload("w", np.ones((2, experts)), np.ones((1, experts, experts))) for experts in (8, 64)}
    assert is_small(Problem([load[8]], machine(1, 1), step))
    assert not is_small(Problem([load[64]], machine(1, 1), step))
    assert not is_small(Problem([load[8]], machine(*[1] * 5), step))
    assert is_small(Problem([load[64]], machine(1, 1), StepShape(communication="dispatch")))
    assert not is_small(Problem([load[64]], machine(1, 1, 1, 1), StepShape(communication="dispatch"), 2))
