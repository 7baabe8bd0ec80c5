"""Annealing of placements: two loops that decide alike, small changes that add up, and searches that stop when told."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.placement_problems import EXPERT_BYTES, machine, random_problem
from moeflow.errors import ConfigError, PlacementError
from moeflow.placement.cost import StepShape
from moeflow.placement.problem import Problem
from moeflow.placement.solvers import anneal, anneal_loop
from moeflow.placement.solvers.anneal import Annealing
from moeflow.placement.solvers.baselines import random_placement
from moeflow.placement.solvers.search import cool, descend
from moeflow.placement.tables import Tables
from moeflow.placement.topology import Gpu, Topology
from moeflow.placement.workload import Workload

needs_c = pytest.mark.skipif(anneal._c_loop() is None, reason="the C loop was not built")
WAYS = [("path", False), ("path", True), ("dispatch", True)]
PAST = -math.inf


def with_communication(problem, communication, **others):
    return replace(problem, step=replace(problem.step, communication=communication), **others)


def uneven_problem(seed, communication, num_replicas=2):
    """Three unequal GPUs with slots 2, 4 and 4 a layer, of which one is free where there are two replicas."""
    rng = np.random.default_rng(seed)
    num_layers, num_experts = 3, 7
    memory = EXPERT_BYTES * num_layers * np.array([2, 9, 9])
    cards = tuple(Gpu(float(m), 1e6 * f, 1e6) for m, f in zip(memory, (1, 2, 3), strict=True))
    workloads = [
        Workload(f"w{name}", rng.gamma(0.5, size=(3, 7)) + 1e-3, rng.gamma(0.3, size=(2, 7, 7))) for name in range(2)
    ]
    step = StepShape(40.0, 128, EXPERT_BYTES, EXPERT_BYTES, communication)
    links = 1e5 * rng.choice([1.0, 2.0, 5.0], (3, 3))
    problem = Problem(workloads, Topology("t", cards, links), step, num_replicas)
    assert problem.slots.tolist() == ([2, 4, 4] if num_replicas else [2, 3, 3])
    assert problem.slots.sum() == num_experts + num_replicas + 1
    return problem


def annealing_of(problem, slowest, seed=0, **tables):
    return Annealing(Tables(problem, slowest=slowest, **tables), random_placement(problem, seed=seed).plan, seed)


def warmth(annealing):
    """A temperature at which some changes that cost are kept and some are not."""
    return 0.2 * annealing.objective() / annealing.copy_expert.size


def state_of(annealing):
    """Everything that a loop changes, to the last bit."""
    return {name: getattr(annealing, name).tobytes() for name in anneal._ARRAYS} | {"random": annealing.random}


# --- the two loops


@needs_c
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("communication", "slowest"), WAYS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_loops_make_the_same_decisions_to_the_last_bit(communication, slowest, seed, temperature):
    problem = uneven_problem(seed, communication)
    weights = np.array([0.3, 0.7])
    in_c, in_python = (annealing_of(problem, slowest, seed, weights=weights) for _ in range(2))
    plans, temperature = [in_c.plan()], temperature * warmth(in_c)
    for _ in range(9):
        kept = in_c.run(100, temperature)
        assert kept == anneal_loop.anneal(in_python.tables, in_python, 100, temperature)
        assert state_of(in_c) == state_of(in_python)
        plans.append(in_c.plan())
    assert len({plan.num_replicas.tobytes() for plan in plans}) > 1  # replicas went to other experts
    assert len({plan.copies().tobytes() for plan in plans}) > 1  # free slots were taken


@needs_c
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(WAYS), st.booleans(), st.sampled_from([0.0, 1.0]))
def test_both_loops_agree_on_any_problem(seed, way, may_replicate, temperature):
    problem = with_communication(random_problem(seed), way[0])
    in_c, in_python = (annealing_of(problem, way[1], seed, may_replicate=may_replicate) for _ in range(2))
    temperature *= warmth(in_c)
    assert in_c.run(150, temperature) == anneal_loop.anneal(in_python.tables, in_python, 150, temperature)
    assert state_of(in_c) == state_of(in_python)


def test_plan_is_the_same_where_the_c_loop_was_not_built(monkeypatch):
    problem = uneven_problem(0, "path")
    tables, start = Tables(problem, slowest=True), random_placement(problem).plan
    built = cool(tables, start, 1000, seed=3).plan
    monkeypatch.setattr(anneal, "_c_loop", lambda: None)
    assert cool(tables, start, 1000, seed=3).plan == built


# --- small changes


@pytest.mark.parametrize("loop", ["as built", "python"])
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(WAYS), st.integers(1, 250), st.sampled_from([0.0, 0.5, 50.0]))
def test_what_small_changes_keep_is_what_the_placement_says(loop, seed, way, proposals, temperature):
    problem = with_communication(random_problem(seed), way[0])
    annealing = annealing_of(problem, way[1], seed)
    temperature *= warmth(annealing)
    if loop == "python":
        anneal_loop.anneal(annealing.tables, annealing, proposals, temperature)
    else:
        annealing.run(10 * proposals, temperature)
    annealing.check_integrity()
    plan = annealing.plan()  # refuses an expert without a copy
    problem.check(plan)
    assert (plan.num_replicas.sum(axis=1) == problem.num_experts + problem.num_replicas).all()
    held = {(layer, *copy) for layer in range(problem.num_layers) for copy in copies_of(annealing, layer)}
    assert held == set(map(tuple, np.argwhere(plan.mask()).tolist()))


def copies_of(annealing, layer):
    return zip(annealing.copy_expert[layer].tolist(), annealing.copy_gpu[layer].tolist(), strict=True)


@pytest.mark.parametrize("name", [*anneal._ARRAYS])
def test_integrity_check_sees_each_array_that_is_wrong(name):
    annealing = annealing_of(uneven_problem(0, "path"), name not in ("pull_s",))
    annealing.run(500, warmth(annealing))
    annealing.check_integrity()
    array = getattr(annealing, name)
    array.flat[0] = array.flat[0] + 1 if name != "copy_gpu" else other_gpu(annealing)
    with pytest.raises(AssertionError):
        annealing.check_integrity()


def other_gpu(annealing):
    """A GPU that does not hold the first copy's expert."""
    return int(np.flatnonzero(annealing.holds[0, annealing.copy_expert[0, 0]] == 0)[0])


def test_where_replicas_may_not_change_experts_keep_their_number_of_copies():
    problem = uneven_problem(1, "path")
    annealing = annealing_of(problem, True, may_replicate=False)
    before = annealing.plan()
    assert annealing.run(2000, warmth(annealing)) > 0
    assert (annealing.plan().num_replicas == before.num_replicas).all()
    assert annealing.plan() != before


def test_objective_is_recomputed_and_moves_by_what_was_kept():
    # A change is kept at temperature 0 only where the objective does not rise: the loop's sums are the objective's.
    for communication, slowest in WAYS:
        annealing = annealing_of(uneven_problem(2, communication), slowest)
        last = annealing.objective()
        for _ in range(100):
            annealing.run(3, 0.0)
            assert annealing.objective() <= last * (1 + 1e-9)
            last = annealing.objective()


# --- what is lowered


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_by_path_the_slowest_links_make_it_the_objective_of_the_problem(seed):
    problem = with_communication(random_problem(seed), "path", worst_case=False)
    annealing = annealing_of(problem, True, seed)
    assert annealing.objective() == pytest.approx(problem.objective(annealing.plan()))
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(problem.workloads)))
    seconds = [cost.step_s for cost in problem.costs(annealing.plan())]
    assert annealing_of(problem, True, seed, weights=weights).objective() == pytest.approx(weights @ seconds)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_by_path_the_mean_over_links_counts_their_mean_time_and_is_never_above(seed):
    problem = with_communication(random_problem(seed), "path", worst_case=False)
    annealing = annealing_of(problem, False, seed)
    plan, pairs = annealing.plan(), max(problem.num_gpus * (problem.num_gpus - 1), 1)
    expected = 0.0
    for cost in problem.costs(plan):
        links = (cost.path_bytes / problem.topology.bandwidth_bytes_per_s).sum() / pairs
        expected += (cost.compute_s.max(axis=1).sum() + links) / len(problem.workloads)
    assert annealing.objective() == pytest.approx(expected)
    assert annealing.objective() <= problem.objective(plan) * (1 + 1e-12)
    traffic_alone = annealing_of(problem, False, seed, balance=0.0)
    compute = np.mean([cost.compute_s.max(axis=1).sum() for cost in problem.costs(plan)])
    assert traffic_alone.objective() == pytest.approx(expected - compute, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_by_dispatch_it_is_the_objective_where_the_busiest_gpu_has_the_busiest_links(seed):
    problem = with_communication(random_problem(seed), "dispatch", worst_case=False)
    annealing = annealing_of(problem, True, seed)
    assert annealing.objective() <= problem.objective(annealing.plan()) * (1 + 1e-12)
    alike = Topology("alike", machine(*[1] * problem.num_gpus).gpus, np.full(2 * (problem.num_gpus,), 1e4))
    prefill = replace(problem, topology=alike)  # reading takes no time: arithmetic and bytes are both by tokens
    annealing = annealing_of(prefill, True, seed)
    assert annealing.objective() == pytest.approx(prefill.objective(annealing.plan()))


# --- searches


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("communication", "slowest"), WAYS)
def test_descent_never_makes_it_worse(communication, slowest, seed):
    problem = with_communication(random_problem(seed, experts=(4, 9), gpus=(2, 5)), communication)
    tables, start = Tables(problem, slowest=slowest), random_placement(problem, seed=seed).plan
    found = descend(tables, start, 4000, seed=seed)
    assert found.ended
    problem.check(found.plan)
    assert Annealing(tables, found.plan).objective() <= Annealing(tables, start).objective() * (1 + 1e-12)


@pytest.mark.parametrize("search", [descend, cool])
def test_search_finds_better_than_where_it_began(search):
    problem = uneven_problem(0, "path")
    tables, start = Tables(problem, slowest=True), random_placement(problem).plan
    found = search(tables, start, 20_000)
    assert Annealing(tables, found.plan).objective() < 0.9 * Annealing(tables, start).objective()


@needs_c
def test_annealing_gets_where_most_descents_do_not():
    # Each expert hands its tokens to one of the next layer, so that none needs to change GPU.
    rng = np.random.default_rng(0)
    following = np.stack([np.eye(12)[rng.permutation(12)] for _ in range(5)])
    step = StepShape(expert_bytes=1, expert_flops=1, token_bytes=10**6)
    problem = Problem([Workload("w", np.ones((6, 12)), following)], machine(1, 1, 1, 1), step)
    tables = Tables(problem)
    starts = [random_placement(problem, seed=seed).plan for seed in range(4)]
    descended, cooled = (
        [problem.costs(search(tables, start, 100_000).plan)[0].crossing for start in starts]
        for search in (descend, cool)
    )
    assert max(cooled) == pytest.approx(0, abs=1e-12)
    assert np.median(descended) > 0.02


@pytest.mark.parametrize("search", [descend, cool])
def test_same_seed_gives_the_same_plan_and_another_another(search):
    problem = uneven_problem(0, "path")
    tables, start = Tables(problem, slowest=True), random_placement(problem).plan
    plans = [search(tables, start, 2000, seed=seed).plan for seed in (1, 1, *range(2, 6))]
    assert plans[0] == plans[1]
    assert any(one != other for one, other in itertools.combinations(plans[1:], 2))


@pytest.mark.parametrize("search", [descend, cool])
@pytest.mark.parametrize(("communication", "slowest"), WAYS)
def test_deadline_that_is_past_gives_a_plan_that_is_no_worse(search, communication, slowest):
    problem = uneven_problem(0, communication)
    tables, start = Tables(problem, slowest=slowest), random_placement(problem).plan
    found = search(tables, start, 1000, deadline=PAST)
    assert not found.ended
    problem.check(found.plan)
    assert Annealing(tables, found.plan).objective() <= Annealing(tables, start).objective() * (1 + 1e-12)


def test_annealing_tells_how_far_it_is_up_to_the_end():
    problem, told = uneven_problem(0, "dispatch"), []
    cool(Tables(problem), random_placement(problem).plan, 1000, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1
    assert len(told) > 100


def test_a_plan_or_weights_of_another_problem_are_refused():
    problem, other = uneven_problem(0, "path"), uneven_problem(0, "path", num_replicas=0)
    with pytest.raises(PlacementError, match="Give a plan of this problem"):
        Annealing(Tables(problem), random_placement(other).plan)
    for weights in (np.ones(1), np.full(2, np.nan)):
        with pytest.raises(PlacementError, match="one number for each"):
            Tables(problem, weights)


@needs_c
def test_arrays_of_another_shape_or_dtype_are_refused():
    for name in anneal._ARRAYS:
        annealing = annealing_of(uneven_problem(0, "path"), True)
        setattr(annealing, name, getattr(annealing, name)[:1])
        with pytest.raises(ConfigError, match="compiled loop reads"):
            annealing.run(5, 1.0)
