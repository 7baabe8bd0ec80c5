"""Solvers of placement: plans within the slots, bounds that hold, and brute force as the oracle of small instances."""

import itertools
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.placement_problems import machine, plans_within, random_plan, random_problem
from moeflow.placement.bounds.balance import balance_bound, layer_bound
from moeflow.placement.cost import StepShape
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem
from moeflow.placement.solvers import SOLVERS
from moeflow.placement.solvers.assignment import assign
from moeflow.placement.solvers.baselines import pack
from moeflow.placement.solvers.cluster_mapping import map_clusters
from moeflow.placement.solvers.eplb import replicate
from moeflow.placement.topology import Gpu, Topology, preset
from moeflow.placement.workload import Workload

OWN = ("contiguous", "random", "greedy", "eplb", "moetuner")


def one_layer(load, topology, num_replicas=0, **step):
    """Arithmetic alone counts: an expert's time is its tokens over the GPU's speed."""
    step = StepShape(**{"assignments": 1e5, "token_bytes": 1, "expert_bytes": 1, "expert_flops": 1, **step})
    workload = Workload("w", [load], np.empty((0, len(load), len(load))))
    return Problem([workload], topology, step, num_replicas)


# --- bounds


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
def test_balance_bound_is_below_every_plan_of_a_tiny_problem(seed):
    problem = random_problem(seed, experts=(2, 5), gpus=(2, 4), layers=(1, 2))
    best = min(problem.objective(p) for p in plans_within(problem.slots, problem.num_layers, problem.num_experts))
    assert 0 < balance_bound(problem) <= best * (1 + 1e-12)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_balance_bound_is_below_random_plans(seed):
    problem = random_problem(seed)
    plan = random_plan(np.random.default_rng(seed), problem.slots, problem.num_layers, problem.num_experts)
    assert (plan.copies() <= problem.slots).all()
    assert balance_bound(problem) <= problem.objective(plan) * (1 + 1e-12)


def test_balance_bound_is_reached_where_load_divides():
    problem = one_layer([3, 1, 2, 2], machine(1, 1))
    assert balance_bound(problem) == pytest.approx(problem.objective(Plan.of_gpus(2, np.array([[0, 0, 1, 1]]))))
    faster = one_layer([6, 1, 1, 1], machine(2, 1))
    assert balance_bound(faster) == pytest.approx(faster.objective(Plan.of_gpus(2, np.array([[0, 1, 1, 1]]))))


def test_balance_bound_knows_that_one_expert_cannot_be_cut_without_a_slot():
    problem = one_layer([98, 1, 1], machine(1, 1, 1))
    assert balance_bound(problem) == pytest.approx(0.98 * 1e5 / 1e6)
    # With slots for two more it may be on all three.
    assert balance_bound(one_layer([98, 1, 1], machine(1, 1, 1), 2)) == pytest.approx(1e5 / 3 / 1e6)


def test_balance_bound_knows_that_a_replica_more_may_only_slow_the_busiest_expert_down():
    # Cut in two, half of it would be on the slow GPU.
    assert balance_bound(one_layer([98, 1, 1], machine(10, 1), 1)) == pytest.approx(0.98 * 1e5 / 10e6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_any_multipliers_bound_a_layer_from_below(seed):
    rng = np.random.default_rng(seed)
    seconds, kinds = rng.random((2, 4, 2)), np.array([0, 0, 1])  # of two resources, on three GPUs of two kinds
    prices, slots = rng.random(2), np.array([2, 2, 1])
    best, least = math.inf, np.full(2, math.inf)
    for gpus in itertools.product(range(3), repeat=4):
        mask = np.eye(3)[list(gpus)]
        if (mask.sum(axis=0) <= slots).all():
            slowest = (seconds[..., kinds] * mask).sum(axis=1).max(axis=1)
            best, least = min(best, float(prices @ slowest)), np.minimum(least, slowest)
    multipliers, rents = rng.random((2, 2)) * rng.choice([0.1, 1, 5]), rng.random(2) * rng.choice([0, 0.1, 1])
    members, rooms = np.array([2, 1]), np.array([4, 1])
    assert layer_bound(seconds, 0.9 * least, prices, members, rooms, multipliers, rents) <= best
    even = np.outer(prices, np.ones(2)) / 3  # exactly a resource's price: more of them proves no more
    once, thrice = (layer_bound(seconds, least, prices, members, rooms, even * n, np.zeros(2)) for n in (1, 3))
    assert once == pytest.approx(thrice)


def test_balance_bound_is_the_same_by_either_solver(monkeypatch):
    problems = [random_problem(seed) for seed in range(8)]
    by_highs = [balance_bound(problem) for problem in problems]
    monkeypatch.setitem(sys.modules, "highspy", None)  # as if not installed
    assert [balance_bound(problem) for problem in problems] == pytest.approx(by_highs, rel=1e-6)


# --- every solver


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("seed", range(8))
def test_solver_keeps_to_slots_and_replicas_and_says_what_its_plan_costs(name, seed):
    problem = random_problem(seed)
    solution = SOLVERS[name](problem, seed=seed, time_limit_s=5.0)
    problem.check(solution.plan)
    replicas = 0 if name == "greedy" else problem.num_replicas
    assert (solution.plan.num_replicas.sum(axis=1) == problem.num_experts + replicas).all()
    assert solution.solver == name
    assert solution.objective == problem.objective(solution.plan)
    assert 0 < solution.bound <= solution.objective
    assert solution.bound == pytest.approx(balance_bound(problem))
    assert (solution.status == "optimal") == (solution.gap < 1e-9)


@pytest.mark.parametrize("name", OWN)
def test_solver_gives_the_same_plan_for_the_same_seed(name):
    problem = random_problem(3, experts=(12, 13), gpus=(4, 5), layers=(3, 4))
    first, second = (SOLVERS[name](problem, seed=7).plan for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", ["contiguous", "greedy", "eplb", "moetuner"])
def test_faster_gpu_with_more_memory_gets_more_load(name):
    cards = (Gpu(9000.0, 4e6, 1e12), Gpu(3000.0, 1e6, 1e12))
    problem = one_layer([5, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1], Topology("t", cards, np.ones((2, 2))), expert_bytes=1000)
    tokens = problem.costs(SOLVERS[name](problem).plan)[0].tokens[0]
    assert tokens[0] > 2 * tokens[1]


def test_random_plans_differ_by_seed():
    problem = random_problem(3, experts=(12, 13), gpus=(4, 5))
    assert SOLVERS["random"](problem, seed=1).plan != SOLVERS["random"](problem, seed=2).plan


def test_contiguous_puts_experts_in_order_and_gives_what_slots_are_left_to_the_busiest():
    assert SOLVERS["contiguous"](one_layer([1] * 8, machine(1, 1))).plan.experts == (((0,),) * 4 + ((1,),) * 4,)
    copies = SOLVERS["contiguous"](one_layer([1] * 10, machine(1, 1, 1, 1))).plan.copies()
    assert sorted(copies[0].tolist()) == [2, 2, 3, 3]
    plan = SOLVERS["contiguous"](one_layer([1, 9, 1, 1, 5, 1], machine(1, 1), 2)).plan
    assert plan.experts == (((0,), (0, 1), (0,), (1,), (0, 1), (1,)),)


# --- greedy and EPLB


def test_eplb_cuts_the_busiest_until_all_gpus_serve_the_same():
    problem = one_layer([8, 4, 2, 2], machine(1, 1), 2)
    solution = SOLVERS["eplb"](problem)
    assert solution.plan.num_replicas.tolist() == [[2, 2, 1, 1]]
    assert problem.costs(solution.plan)[0].imbalance == pytest.approx(1)
    assert solution.status == "optimal"


def test_no_expert_gets_more_replicas_than_there_are_gpus():
    assert replicate(np.array([[90.0, 1, 1]]), 3, 2).tolist() == [[2, 2, 2]]


def test_replica_whose_gpus_are_full_takes_the_place_of_one_that_can_move():
    seconds = np.array([9.0, 8.0, 1.0])[None, None, :, None] * np.ones(2)
    held = pack(seconds, np.array([[1, 1, 2]]), np.array([3, 1]))
    assert held[0].tolist() == [[True, False], [True, False], [True, True]]


def test_place_that_a_moved_replica_took_is_taken():
    seconds = np.array([9.0, 8.0, 1.0, 0.5])[None, None, :, None] * np.ones(2)
    held = pack(seconds, np.array([[1, 1, 2, 1]]), np.array([3, 1]))
    assert held[0].sum(axis=0).tolist() == [3, 1]


def test_replica_that_no_gpu_can_take_is_left_out():
    held = pack(np.ones((1, 1, 2, 2)), np.array([[2, 2]]), np.array([3, 1]))
    assert held[0].sum() == 3
    assert held[0].any(axis=1).all()


@pytest.mark.slow
def test_eplb_balances_deepseek_v3_on_32_gpus_within_2_percent(data_folder):
    counts = json.loads((data_folder / "deepseek_v3_load" / "prefill_in1024.json").read_text())["logical_count"]
    workload = Workload.of_counts("prefill", np.array(counts))
    step = StepShape(communication="dispatch")
    problem = Problem([workload], preset("nvlink", 32).without_memory_limits(), step, num_replicas=32)
    contiguous, eplb = (problem.costs(SOLVERS[name](problem).plan)[0].imbalance for name in ("contiguous", "eplb"))
    assert eplb < 1.02 < contiguous


# --- MoETuner


def clusterings(copies, slots):
    """Every way to put each expert in as many clusters as it has replicas, within the slots: [E, G] bool."""
    ways = [itertools.combinations(range(len(slots)), count) for count in copies]
    for chosen in itertools.product(*map(list, ways)):
        mask = np.zeros((len(copies), len(slots)), bool)
        for expert, gpus in enumerate(chosen):
            mask[expert, list(gpus)] = True
        if (mask.sum(axis=0) <= slots).all():
            yield mask


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_moetuner_clusters_are_the_most_even_there_are(seed):
    problem = random_problem(seed, experts=(4, 7), gpus=(2, 4), layers=(2, 3))
    solution = SOLVERS["moetuner"](problem)
    copies = solution.plan.num_replicas
    tokens = np.stack([w.shares() for w in problem.workloads]) * problem.step.assignments / copies
    seconds = problem.step.expert_seconds(tokens, problem.topology)  # [W, L, E, G]
    combine = max if problem.worst_case else np.mean
    found = solution.plan.mask()
    for layer in range(problem.num_layers):
        slowest = [
            combine((seconds[:, layer] * mask).sum(axis=1).max(axis=1))
            for mask in (found[layer], *clusterings(copies[layer], problem.slots))
        ]
        assert slowest[0] <= min(slowest) * (1 + 1.1e-3)  # the gap at which a program may stop


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_moetuner_maps_clusters_with_the_least_slowest_transfers(seed):
    problem = replace(random_problem(seed, experts=(6, 8), gpus=(3, 4), layers=(3, 4)), topology=machine(1, 1, 1))
    links = np.random.default_rng(seed).uniform(1, 5, (3, 3)) * 1e5
    step = replace(problem.step, communication="path")
    problem = replace(problem, topology=replace(problem.topology, bandwidth_bytes_per_s=links), step=step)
    mask = SOLVERS["moetuner"](problem).plan.mask()
    orders = list(itertools.permutations(range(3)))

    def slowest(plan):
        seconds = np.array([cost.link_s for cost in problem.costs(plan)])
        return (seconds.max(axis=0) if problem.worst_case else seconds.mean(axis=0)).sum()

    chains = itertools.product(orders, repeat=3)
    every = [Plan.of_mask(np.stack([m[:, o] for m, o in zip(mask, chain, strict=True)])) for chain in chains]
    assert slowest(Plan.of_mask(mask)) == pytest.approx(min(map(slowest, every)))


def test_many_clusters_follow_the_path_of_tokens():
    # Seven GPUs, 5,040 orders a layer: layer by layer. Each expert hands its tokens to one expert of the next layer.
    rng = np.random.default_rng(0)
    following = np.stack([np.eye(14)[rng.permutation(14)] for _ in range(3)])
    workload = Workload("w", np.ones((4, 14)), following)
    problem = Problem([workload], machine(*[1] * 7), StepShape(expert_bytes=1, expert_flops=1))
    shares = np.zeros((4, 14, 7))
    members = np.arange(14) % 7
    for layer in range(4):
        shares[layer, np.arange(14), rng.permutation(7)[members]] = 1
        if layer < 3:
            members = members[following[layer].argmax(axis=0)]
    order, ended = map_clusters(problem, shares)
    assert ended
    placed = np.zeros_like(shares)
    np.put_along_axis(placed, np.broadcast_to(order[:, None], shares.shape), shares, axis=2)
    assert problem.costs(Plan.of_mask(placed > 0))[0].crossing == pytest.approx(0, abs=1e-12)


def test_with_dispatch_the_busiest_cluster_of_equal_gpus_gets_the_fastest_link():
    links = np.full((3, 3), 1e6)
    links[2, :] = links[:, 2] = 1e5
    links[0, 2] = links[2, 0] = 1e6
    problem = one_layer([5, 3, 2], machine(1, 1, 1), communication="dispatch")
    problem = replace(problem, topology=replace(problem.topology, bandwidth_bytes_per_s=links))
    plan = SOLVERS["moetuner"](problem).plan
    assert plan.experts[0][0] == (0,)


def test_large_layer_is_balanced_by_pairs_of_clusters():
    load = np.random.default_rng(0).gamma(0.7, size=256)
    problem = one_layer(load, machine(*[1] * 32), 32)
    packed, balanced = (problem.costs(SOLVERS[name](problem).plan)[0].imbalance for name in ("eplb", "moetuner"))
    assert balanced - 1 < 0.5 * (packed - 1)
    assert balanced < 1.002


def test_no_time_gives_the_packed_plan_and_says_so():
    problem = random_problem(3, experts=(12, 13), gpus=(4, 5), layers=(3, 4))
    solution = SOLVERS["moetuner"](problem, time_limit_s=0.0)
    problem.check(solution.plan)
    assert solution.status == "time limit"


def test_moetuner_reports_every_layer():
    problem, told = random_problem(3, experts=(6, 7), gpus=(3, 4), layers=(4, 5)), []
    SOLVERS["moetuner"](problem, progress=lambda done, what: told.append((done, what)))
    assert [done for done, _ in told] == pytest.approx([0.25, 0.5, 0.75, 1])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6).flatmap(lambda n: st.lists(st.integers(-3, 5), min_size=n * n, max_size=n * n)))
def test_assignment_is_the_brute_force_optimum(values):
    size = math.isqrt(len(values))
    costs, rows = np.array(values, float).reshape(size, size), np.arange(size)
    places = assign(costs)
    assert sorted(places.tolist()) == rows.tolist()
    assert costs[rows, places].sum() == min(
        costs[rows, list(order)].sum() for order in itertools.permutations(range(size))
    )
