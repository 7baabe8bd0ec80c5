"""Bounds on what tokens' paths cost: below the best of every plan, whatever the multipliers, and tight where known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.placement_problems import layers_within, machine, plans_within, random_problem
from moeflow.placement.bounds.partition import Partition, _Relaxation, partition_bound
from moeflow.placement.bounds.path import path_bound
from moeflow.placement.cost import StepShape
from moeflow.placement.problem import Problem
from moeflow.placement.solvers.anneal import Annealing
from moeflow.placement.solvers.baselines import random_placement
from moeflow.placement.solvers.search import cool
from moeflow.placement.tables import Tables
from moeflow.placement.topology import Gpu, Topology
from moeflow.placement.workload import Workload

ROUNDING = 1e-9


def least_cost(partition, slots):
    """Of every placement within the slots the cheapest, layer by layer: what crosses, and the busiest part's work."""
    shares = layers_within(slots, partition.traffic.shape[1])
    work = np.zeros((len(partition.traffic) + 1, shares.shape[1])) if partition.work is None else partition.work
    busiest = (work[:, None, :, None] * shares).sum(axis=2).max(axis=2)  # [L, N]
    best = busiest[0]
    for traffic, of_layer in zip(partition.traffic, busiest[1:], strict=True):
        stays = np.einsum("aig,ij,bjg->ab", shares, traffic, shares, optimize=True)
        best = (best[:, None] + traffic.sum() - stays).min(axis=0) + of_layer
    return float(best.min())


def random_partition(seed):
    """A tiny one and the slots of its parts: equal or not, with work or without, traffic dense or sparse."""
    rng = np.random.default_rng(seed)
    parts = int(rng.integers(2, 4))
    equal = bool(rng.integers(2))
    experts = parts * int(rng.integers(1, 7 // parts)) if equal else int(rng.integers(2, 5))
    layers = int(rng.integers(2, 5))
    if equal:
        slots = np.full(parts, experts // parts)
    else:
        slots = rng.integers(1, experts + 1, parts)
        slots[0] += max(experts - slots.sum(), 0)
        slots = np.minimum(slots, experts)
    if slots.sum() < experts:
        slots[:] = experts
    traffic = rng.gamma(float(rng.choice([0.1, 1.0])), size=(layers - 1, experts, experts))
    traffic *= rng.random(traffic.shape) < rng.choice([0.3, 1.0])
    work = rng.gamma(0.7, size=(layers, experts)) * rng.choice([0.1, 1, 10]) if rng.integers(2) else None
    return Partition(traffic, work, parts, int(slots.max()), equal), slots


def is_below(bound, least):
    return bound <= least * (1 + ROUNDING) + ROUNDING


# --- the relaxation


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_no_placement_is_below_the_bound(seed):
    partition, slots = random_partition(seed)
    bound = partition_bound(partition)
    assert bound >= 0
    assert is_below(bound, least_cost(partition, slots))


@pytest.mark.slow
def test_the_bound_is_near_the_best_of_small_partitions():
    ratios = []
    for seed in range(60):
        partition, slots = random_partition(seed)
        least = least_cost(partition, slots)
        if least > 0 and partition.equal:
            ratios.append(partition_bound(partition) / least)
    assert len(ratios) > 20
    assert np.mean(ratios) > 0.9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_bound_of_a_search_that_was_stopped_holds(seed, iterations):
    partition, slots = random_partition(seed)
    least = least_cost(partition, slots)
    assert is_below(partition_bound(partition, iterations=iterations), least)
    assert is_below(partition_bound(partition, time_limit_s=0.0), least)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 100.0]), st.booleans())
def test_any_multipliers_prove_a_bound_that_holds(seed, size, begun):
    partition, slots = random_partition(seed)
    scale = float(partition.traffic.sum()) or 1.0
    relaxation, rng = _Relaxation(partition, scale), np.random.default_rng(seed)
    for _ in range(20 if begun else 0):
        relaxation.step()
    relaxation.rho *= size
    noise = rng.normal(size=relaxation.multiplier.shape) / (1 if begun else relaxation.rho)
    relaxation.multiplier += 0.1 * noise
    for multiplier in relaxation.cap_multipliers:
        multiplier += 0.1 * rng.normal(size=multiplier.shape) / (1 if begun else relaxation.rho)
    assert is_below(relaxation.bound() * scale, least_cost(partition, slots))


@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_replicas_of_a_heavy_expert_are_not_forbidden_by_the_bound(shift):
    # Work wants both experts on both parts, for which X's diagonal and trace are less than one copy's.
    partition = Partition(0.01 * np.ones((1, 2, 2)), np.array([[9.0, 1], [1, 9]]), 2, 2, False)
    least, scale = least_cost(partition, [2, 2]), 0.04
    assert least == pytest.approx(10.02)
    assert partition_bound(partition) == pytest.approx(least, rel=5e-3)
    relaxation = _Relaxation(partition, scale)
    for _ in range(200):
        relaxation.step()
    relaxation.multiplier += shift / relaxation.rho * np.eye(4)
    assert is_below(relaxation.bound() * scale, least)


def test_bound_only_rises_with_more_iterations():
    partition, _ = random_partition(5)
    bounds = [partition_bound(partition, iterations=number) for number in (25, 100, 400)]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(("experts", "parts", "layers"), [(8, 2, 3), (6, 3, 2), (8, 4, 3), (12, 3, 4)])
def test_of_uniform_traffic_all_but_a_part_crosses(experts, parts, layers, equal):
    traffic = np.ones((layers - 1, experts, experts))
    bound = partition_bound(Partition(traffic, None, parts, experts // parts, equal))
    assert bound / traffic.sum() == pytest.approx(1 - 1 / parts, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("with_work", [True, False])
@pytest.mark.parametrize("between", [0.0, 0.05, 0.3])
def test_of_hidden_clusters_just_what_goes_between_them_crosses(between, with_work, equal):
    rng = np.random.default_rng(0)
    clusters = [rng.permutation(np.arange(12) % 3) for _ in range(4)]
    together = np.stack([one[:, None] == other for one, other in itertools.pairwise(clusters)])
    traffic = np.where(together, 1.0, between)
    work = np.ones((4, 12)) if with_work else None
    bound = partition_bound(Partition(traffic, work, 3, 4, equal))
    even = 4 * 12 / 3 if with_work else 0
    assert bound == pytest.approx(traffic[~together].sum() + even, rel=1e-3, abs=1e-9)


def test_without_traffic_the_work_alone_counts():
    work = np.array([[3.0, 1, 0, 0], [1, 1, 1, 1]])
    assert partition_bound(Partition(np.zeros((1, 4, 4)), work, 2, 2, True)) == pytest.approx(4)
    assert partition_bound(Partition(np.zeros((1, 4, 4)), None, 2, 2, True)) == 0


def test_bound_tells_how_far_it_is_up_to_the_end():
    told = []
    partition_bound(random_partition(5)[0], iterations=100, progress=told.append)
    assert told == sorted(told)
    assert len(told) > 1
    assert told[-1] <= 1


# --- problems


def by_path(problem):
    return replace(problem, step=replace(problem.step, communication="path"))


def tiny_problem(seed):
    """Few enough plans to try each; unequal GPUs, slots and links, several workloads, mean or worst."""
    problem = by_path(random_problem(seed, experts=(2, 5), gpus=(2, 4), layers=(2, 3)))
    return replace(problem, step=replace(problem.step, token_bytes=int(2 ** (seed % 14))))


def count_layers(problem):
    return sum(1 for _ in plans_within(problem.slots, 1, problem.num_experts))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_no_plan_of_a_tiny_problem_is_below_the_bound(seed):
    problem = tiny_problem(seed)
    if problem.num_gpus == 1 or count_layers(problem) > 50:
        return
    plans = list(plans_within(problem.slots, problem.num_layers, problem.num_experts))
    assert is_below(path_bound(Tables(problem)), min(map(problem.objective, plans)))


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_nothing_that_annealing_counts_is_below_the_bound(seed):
    problem = tiny_problem(seed)
    if problem.num_gpus == 1 or count_layers(problem) > 50:
        return
    copies = problem.num_experts + problem.num_replicas
    for balance in (1.0, 0.1):
        tables = Tables(problem, balance=balance)
        plans = plans_within(problem.slots, problem.num_layers, problem.num_experts)
        whole = (plan for plan in plans if (plan.num_replicas.sum(axis=1) == copies).all())
        assert is_below(path_bound(tables), min(Annealing(tables, plan).objective() for plan in whole))


def two_level_problem(seed, links=(9e4, 1e4)):
    rng = np.random.default_rng(seed)
    nodes = np.array([0, 0, 1, 1])
    cards = tuple(Gpu(1e12, 1e6, 1e6, int(node)) for node in nodes)
    bandwidth = np.where(nodes[:, None] == nodes, *links)
    workload = Workload("w", rng.gamma(1, size=(2, 4)), rng.gamma(0.2, size=(1, 4, 4)))
    return Problem([workload], Topology("t", cards, bandwidth), StepShape(20.0, 2000, 12288, 12288))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_no_plan_on_two_nodes_is_below_the_bound(seed):
    problem = two_level_problem(seed)
    least = min(map(problem.objective, plans_within(problem.slots, 2, 4)))
    bound = path_bound(Tables(problem))
    assert is_below(bound, least)
    near = replace(problem, topology=two_level_problem(seed, (9e4, 9e4)).topology)
    assert bound > path_bound(Tables(near))  # slow links between nodes are seen


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_no_plan_with_a_replica_on_two_nodes_is_below_the_bound(seed):
    problem = replace(two_level_problem(seed), num_replicas=1)
    plans = plans_within(np.array([2, 1, 1, 1]), 2, 4)  # not all there are: those take minutes
    assert is_below(
        path_bound(Tables(problem)), min(problem.objective(plan) for plan in itertools.islice(plans, 0, None, 7))
    )


def test_uniform_traffic_on_two_nodes_is_bounded_by_what_it_takes():
    problem = two_level_problem(0)
    problem = replace(problem, workloads=(Workload("even", np.ones((2, 4)), np.ones((1, 4, 4))),))
    tables = Tables(problem)
    taken = Annealing(tables, random_placement(problem).plan).objective()
    assert path_bound(tables) == pytest.approx(taken, rel=1e-3)
    assert is_below(path_bound(tables), taken)


def test_worst_workload_on_unequal_gpus_is_not_below_the_bound():
    # One workload computes long and crosses nothing, the other the reverse: the worst is not the sum of both.
    skewed = Workload("skewed", [[97, 1, 1, 1]] * 2, [np.eye(4)])
    mixed = Workload("mixed", np.ones((2, 4)), np.ones((1, 4, 4)))
    cards = tuple(Gpu(1e12, speed, 1e12) for speed in (1.0e6, 1.0e6, 1.0e6, 1.01e6))
    step = StepShape(1e3, 1, 1, 1000, "path")
    problem = Problem([skewed, mixed], Topology("t", cards, np.full((4, 4), 1e3 / 16)), step, worst_case=True)
    least = min(map(problem.objective, plans_within(problem.slots, 2, 4)))
    assert is_below(path_bound(Tables(problem)), least)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_replicas", [0, 3])
def test_nothing_that_a_search_finds_is_below_the_bound(seed, num_replicas):
    rng = np.random.default_rng(seed)
    cluster = rng.permuted(np.tile(np.arange(12) % 3, (4, 1)), axis=1)
    traffic = rng.gamma(0.5, size=(3, 12, 12)) + 2 * (cluster[:-1, :, None] == cluster[1:, None, :])
    workload = Workload("w", rng.gamma(3, size=(4, 12)), traffic)
    step = StepShape(1000.0, 2000, 1, 1000)
    problem = Problem([workload], Topology("t", machine(1, 1, 1).gpus, np.full((3, 3), 1e6)), step, num_replicas)
    tables = Tables(problem)
    found = cool(tables, random_placement(problem).plan, 100_000, seed=seed).plan
    bound, annealed = path_bound(tables), Annealing(tables, found).objective()
    assert is_below(bound, annealed)
    assert is_below(bound, problem.objective(found))
    assert bound > 0.8 * annealed


def test_bound_without_time_is_still_one():
    problem = two_level_problem(0)
    stopped, whole = path_bound(Tables(problem), time_limit_s=0.0), path_bound(Tables(problem))
    assert 0 < stopped <= whole
