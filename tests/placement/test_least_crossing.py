"""Least crossing within a limit of imbalance: it keeps to the limit, finds what was hidden, and its bounds hold."""

import itertools

import numpy as np
import pytest

from helpers.placement_problems import layers_within, machine
from moeflow.errors import PlacementError
from moeflow.placement.cost import StepShape
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem
from moeflow.placement.solvers import anneal
from moeflow.placement.solvers.least_crossing import (
    crossing_bounds,
    crossing_solver,
    least_crossing,
    pareto_curve,
)
from moeflow.placement.topology import Gpu, Topology
from moeflow.placement.workload import Workload

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(anneal._c_loop() is None, reason="takes minutes where the C loop was not built"),
]


def planted(num_layers, num_experts, num_gpus, between=0.05, seed=0):
    """Transitions within hidden clusters, of which each GPU can hold one; and the share that goes between them."""
    rng = np.random.default_rng(seed)
    clusters = [rng.permutation(np.arange(num_experts) % num_gpus) for _ in range(num_layers)]
    together = np.stack([one[:, None] == other for one, other in itertools.pairwise(clusters)])
    transitions = np.where(together, 1.0, between)
    return transitions, float(transitions[~together].sum() / transitions.sum())


def problem_of(load, transitions, num_gpus, num_replicas=0):
    return Problem([Workload("w", load, transitions)], machine(*[1] * num_gpus), StepShape(), num_replicas)


def skewed_problem(seed=0, num_layers=3, num_experts=6, num_gpus=2, **others):
    """Clusters of unlike load, so that less crossing costs balance."""
    transitions, _ = planted(num_layers, num_experts, num_gpus, 0.3, seed)
    rng = np.random.default_rng(seed)
    load = rng.gamma(2, size=(num_layers, num_experts))
    return problem_of(load, transitions * rng.gamma(2, size=transitions.shape), num_gpus, **others)


def every_plan_of(problem):
    """Crossing and imbalance of every plan, [N] each, means over the workloads."""
    shares = layers_within(problem.slots, problem.num_experts)
    crossing, imbalance = 0.0, 0.0
    for workload in problem.workloads:
        busiest = np.einsum("le,neg->lng", workload.shares(), shares).max(axis=2) * problem.num_gpus
        share = 1 / len(problem.workloads)
        for layer in range(problem.num_layers):
            along = [1] * problem.num_layers  # of the layer's plans: one axis for each layer
            along[layer] = -1
            imbalance = imbalance + share * busiest[layer].reshape(along) / problem.num_layers
            if layer + 1 < problem.num_layers:
                counts = workload.transitions[layer] / workload.transitions[layer].sum()
                stays = np.einsum("aig,ij,bjg->ab", shares, counts, shares, optimize=True)
                along[layer : layer + 2] = stays.shape
                crossing = crossing + share * (1 - stays).reshape(along) / (problem.num_layers - 1)
    return crossing.ravel(), imbalance.ravel()


def least_within(problem, limit):
    crossing, imbalance = every_plan_of(problem)
    return float(crossing[imbalance <= limit * (1 + 1e-9)].min())


def check_front(points):
    """No point is as good as another in both."""
    assert points
    for one, other in itertools.permutations(points, 2):
        assert one.crossing < other.crossing or one.imbalance < other.imbalance
    assert [point.imbalance for point in points] == sorted(point.imbalance for point in points)


def test_planted_clusters_are_found_and_proven():
    for num_experts, num_gpus in ((8, 2), (12, 3), (12, 4)):
        transitions, crossing = planted(4, num_experts, num_gpus)
        found = least_crossing(problem_of(np.ones((4, num_experts)), transitions, num_gpus), 1.05)
        assert found.point.crossing == pytest.approx(crossing)
        assert found.bound == pytest.approx(crossing, rel=1e-3)
        assert found.gap < 1e-3
        assert found.status == "feasible"


@pytest.mark.parametrize("beyond", [1e-3, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(2))
def test_limit_is_kept_and_the_bound_is_below_the_best_of_every_plan(seed, beyond):
    problem = skewed_problem(seed)
    limit = float(every_plan_of(problem)[1].min()) + beyond
    found = least_crossing(problem, limit)
    problem.check(found.point.plan)
    cost = problem.costs(found.point.plan)[0]
    assert (cost.crossing, cost.imbalance) == (found.point.crossing, found.point.imbalance)
    assert found.point.imbalance <= limit
    best = least_within(problem, limit)
    assert found.bound <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= found.point.crossing <= 1.2 * best


def test_less_crossing_is_had_for_less_balance():
    problem = skewed_problem(1)
    least = float(every_plan_of(problem)[1].min())
    crossings = [least_crossing(problem, least + beyond).point.crossing for beyond in (0.001, 0.1, 1.0)]
    assert crossings == sorted(crossings, reverse=True)
    assert crossings[0] > 1.2 * crossings[-1]


def test_limit_that_nobody_can_keep_is_refused_with_the_least_that_was_found():
    problem = problem_of([[97.0, 1, 1, 1]] * 2, np.ones((1, 4, 4)), 2)
    with pytest.raises(PlacementError, match=r"at most 1\.1; the most even one has 1\.9600"):
        least_crossing(problem, 1.1)
    assert least_crossing(problem, 1.97).point.imbalance == pytest.approx(1.96)


def test_even_load_keeps_to_a_limit_of_one_whatever_the_rounding():
    # Sevenths of a step do not add up to it in floating point.
    assert least_crossing(problem_of(np.ones((2, 7)), np.ones((1, 7, 7)), 7), 1.0).point.crossing > 0


@pytest.mark.parametrize("limit", [0.99, -1.0, float("nan")])
def test_limit_below_one_is_refused(limit):
    with pytest.raises(PlacementError, match="Even load is 1"):
        least_crossing(skewed_problem(), limit)


def test_counts_without_transitions_are_refused():
    problem = Problem([Workload("w", np.ones((2, 4)))], machine(1, 1), StepShape(communication="dispatch"))
    for ask in (lambda: least_crossing(problem, 1.1), lambda: pareto_curve(problem, [1.0])):
        with pytest.raises(PlacementError, match="Give a trace"):
            ask()


def test_bound_holds_where_one_of_two_workloads_lacks_the_transitions_between_two_layers():
    rng = np.random.default_rng(10)
    transitions = rng.gamma(0.3, size=(2, 2, 4, 4)) + 1e-3
    transitions[1, 0] = 0
    workloads = [Workload("w", rng.gamma(1, size=(3, 4)), counts) for counts in transitions]
    problem = Problem(workloads, machine(1, 1), StepShape())
    answer = least_crossing(problem, 2.0)  # any plan
    halves = [row for row in itertools.product(range(2), repeat=4) if sum(row) == 2]
    crossing = []
    for rows in itertools.product(halves, repeat=3):
        sent = sum(cost.path_bytes for cost in problem.costs(Plan.of_gpus(2, np.array(rows)))).sum(axis=0)
        crossing.append(1 - sent.trace() / sent.sum())
    assert answer.bound <= min(crossing) + 1e-9
    assert answer.point.crossing == pytest.approx(min(crossing))


def test_one_layer_has_no_transitions():
    with pytest.raises(PlacementError, match="counts have none"):
        least_crossing(problem_of(np.ones((1, 4)), np.zeros((0, 4, 4)), 2), 1.2)


def test_on_one_gpu_nothing_crosses():
    answer = least_crossing(skewed_problem(num_gpus=1), 1.2)
    assert (answer.point.crossing, answer.bound, answer.point.imbalance) == (0, 0, pytest.approx(1))


def test_speeds_links_and_communication_are_not_looked_at():
    problem = skewed_problem()
    cards = (Gpu(1e12, 1e6, 1e3), Gpu(1e12, 9e6, 1e9))
    links = np.array([[1, 1e3], [1e9, 1]])
    other = Problem(problem.workloads, Topology("other", cards, links), StepShape(communication="dispatch"))
    found = [least_crossing(each, 1.2) for each in (problem, other)]
    assert found[0].point.crossing == pytest.approx(found[1].point.crossing)
    assert found[0].bound == pytest.approx(found[1].bound)


@pytest.mark.parametrize("num_replicas", [0, 2])
def test_curve_holds_no_plan_that_another_is_better_than(num_replicas):
    problem = skewed_problem(2, 3, 8, 2, num_replicas=num_replicas)
    check_front(least_crossing(problem, 1.2).curve)
    told = []
    points = pareto_curve(problem, [0.0, 0.1, 0.3, 1.0, 4.0], progress=lambda done, what: told.append(done))
    check_front(points)
    assert len(points) > 1
    assert told[-1] == 1
    for point in points:
        problem.check(point.plan)


def test_curve_and_bounds_enclose_every_plan():
    problem, weights = skewed_problem(3), [0.0, 0.1, 0.3, 1.0]
    crossing, imbalance = every_plan_of(problem)
    limits = [float(imbalance.min()) + beyond for beyond in (0.001, 0.1, 0.5)]
    for limit, bound in zip(limits, crossing_bounds(problem, weights, limits), strict=True):
        assert bound <= least_within(problem, limit) * (1 + 1e-9)
    assert crossing_bounds(problem, weights, limits[:1]) > crossing_bounds(problem, [0.0], limits[:1])
    free = pareto_curve(problem, weights)[-1]  # at weight 0 crossing alone counts
    assert free.crossing == pytest.approx(crossing.min())


def test_of_several_workloads_the_mean_keeps_to_the_limit():
    problems = [skewed_problem(seed) for seed in range(3)]
    problem = Problem([each.workloads[0] for each in problems], problems[0].topology, StepShape(), worst_case=True)
    limit = float(every_plan_of(problem)[1].min()) + 0.05
    found = least_crossing(problem, limit)
    costs = problem.costs(found.point.plan)
    assert found.point.imbalance == pytest.approx(np.mean([cost.imbalance for cost in costs]))
    assert found.point.imbalance <= limit
    assert found.point.crossing == pytest.approx(np.mean([cost.crossing for cost in costs]))
    assert found.bound <= least_within(problem, limit) * (1 + 1e-9)


def test_without_time_there_is_a_plan_where_packing_keeps_to_the_limit():
    problem = skewed_problem()
    found = least_crossing(problem, 2.0, time_limit_s=0.0)
    problem.check(found.point.plan)
    assert found.status == "time limit"
    assert 0 <= found.bound <= found.point.crossing


def test_same_seed_gives_the_same_plan():
    problem = skewed_problem(2, 3, 8, 2)
    assert least_crossing(problem, 1.1, seed=3).point == least_crossing(problem, 1.1, seed=3).point


def test_as_a_solver_it_is_judged_by_time_too():
    problem, told = skewed_problem(), []
    solution = crossing_solver(1.2)(problem, seed=1, progress=lambda done, what: told.append(done))
    assert solution.objective == problem.objective(solution.plan)
    assert 0 < solution.bound <= solution.objective
    assert solution.crossing == problem.costs(solution.plan)[0].crossing
    assert solution.crossing_bound <= solution.crossing
    assert solution.max_imbalance == 1.2
    assert told == sorted(told)
