"""The joint solver: never behind those it starts from, its gap honest, and what it does when there is no time."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from helpers.placement_problems import machine, random_problem
from moeflow.placement.cost import StepShape
from moeflow.placement.problem import Problem
from moeflow.placement.solvers import SOLVERS, anneal
from moeflow.placement.solvers.exact import is_small
from moeflow.placement.solvers.joint import joint
from moeflow.placement.topology import Topology, preset
from moeflow.placement.workload import Workload

needs_c = pytest.mark.skipif(anneal._c_loop() is None, reason="takes minutes where the C loop was not built")
FOREVER = 3600.0


def medium_problem(seed=0, num_replicas=0, *, workloads=1, communication="path", links=1e9, num_gpus=4, **others):
    """Three layers of 16 experts: hidden paths, load that follows them, slow links or fast."""
    rng = np.random.default_rng(seed)
    counts = []
    for name in range(workloads):
        following = np.stack([np.eye(16)[rng.permutation(16)] for _ in range(2)])
        transitions = rng.gamma(0.5, size=(2, 16, 16)) + 8 * following
        counts.append(Workload(f"w{name}", rng.gamma(2, size=(3, 16)), transitions))
    topology = Topology("t", machine(*[1] * num_gpus).gpus, np.full((num_gpus, num_gpus), links))
    step = StepShape(1000.0, 1000, 12288, 1000, communication)
    return Problem(counts, topology, step, num_replicas, **others)


def check(problem, solution):
    """What holds for every answer."""
    problem.check(solution.plan)
    assert solution.objective == problem.objective(solution.plan)
    assert 0 < solution.bound <= solution.objective
    assert solution.status in ("optimal", "feasible", "time limit")
    assert (solution.status == "optimal") == (solution.gap <= 1e-6)
    assert (solution.plan.num_replicas.sum(axis=1) <= problem.num_experts + problem.num_replicas).all()


@pytest.mark.slow
@needs_c
@pytest.mark.parametrize("links", [1e9, 1e6])
@pytest.mark.parametrize(("num_replicas", "communication"), [(0, "path"), (4, "path"), (4, "dispatch")])
def test_joint_is_not_behind_the_others(num_replicas, communication, links):
    problem = medium_problem(0, num_replicas, communication=communication, links=links)
    assert not is_small(problem)
    solution = joint(problem, time_limit_s=FOREVER)
    check(problem, solution)
    assert solution.status != "time limit"
    others = {name: SOLVERS[name](problem).objective for name in ("greedy", "eplb", "moetuner")}
    assert solution.objective <= min(others["greedy"], others["eplb"])
    assert solution.objective <= 1.01 * others["moetuner"]


@pytest.mark.slow
@needs_c
def test_joint_gains_where_paths_and_links_matter():
    problem = medium_problem(0, links=1e6)
    solution = joint(problem, time_limit_s=FOREVER)
    assert solution.objective < 0.9 * min(SOLVERS[name](problem).objective for name in ("greedy", "eplb"))
    assert solution.bound_by == "semidefinite relaxation"
    assert solution.bound > 1.05 * SOLVERS["greedy"](problem).bound


@pytest.mark.slow
@needs_c
@pytest.mark.parametrize("seed", range(6))
def test_joint_says_what_its_plan_costs_and_its_gap_is_honest(seed):
    problem = random_problem(seed, experts=(4, 9), gpus=(2, 5), layers=(1, 4))
    solution = joint(problem, seed=seed, time_limit_s=1.0)
    check(problem, solution)
    assert solution.objective <= min(SOLVERS[name](problem).objective for name in ("greedy", "eplb"))


@pytest.mark.slow
@needs_c
def test_same_seed_gives_the_same_plan_and_another_usually_another():
    problem = medium_problem(1, 2, links=1e6)
    first, again, other = (joint(problem, seed=seed, time_limit_s=FOREVER).plan for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("communication", ["path", "dispatch"])
@pytest.mark.parametrize("num_replicas", [0, 3])
def test_without_time_there_is_a_plan_that_is_no_worse_than_packing(communication, num_replicas):
    problem = medium_problem(0, num_replicas, communication=communication, workloads=2)
    solution = joint(problem, time_limit_s=0.0)
    check(problem, solution)
    assert solution.status == "time limit"
    assert solution.objective <= min(SOLVERS[name](problem).objective for name in ("greedy", "eplb"))


@pytest.mark.slow
@needs_c
@pytest.mark.parametrize("seed", [1, 3])
def test_worst_case_lowers_the_worst_at_the_others_cost(seed):
    first, *others = medium_problem(seed, workloads=3, links=1e6).workloads
    mean = replace(medium_problem(links=1e6), workloads=(replace(first, load=first.load**2), *others))
    worst = replace(mean, worst_case=True)
    for_mean, for_worst = (joint(problem, time_limit_s=FOREVER) for problem in (mean, worst))
    check(worst, for_worst)
    assert for_worst.objective == max(cost.step_s for cost in worst.costs(for_worst.plan))
    assert for_worst.objective < 0.95 * worst.objective(for_mean.plan)
    assert for_mean.objective < 0.95 * mean.objective(for_worst.plan)


@needs_c
def test_by_dispatch_it_stops_at_half_a_percent_without_annealing():
    problem = medium_problem(3, 4, communication="dispatch", links=1e12)
    told = []
    solution = joint(problem, time_limit_s=FOREVER, progress=lambda done, what: told.append(what))
    assert solution.status == "feasible"
    assert 0 < solution.gap <= 5e-3
    assert "annealing" not in told
    packed = SOLVERS["eplb"](problem)
    assert solution.objective < packed.objective < SOLVERS["greedy"](problem).objective
    assert (solution.plan.num_replicas == packed.plan.num_replicas).all()  # replicas stay with whom they were


@pytest.mark.slow
@needs_c
def test_deepseek_load_on_32_gpus_is_even_within_2_percent_and_within_nine_slots(data_folder):
    counts = json.loads((data_folder / "deepseek_v3_load" / "prefill_in1024.json").read_text())["logical_count"]
    step = StepShape(assignments=1e6, communication="dispatch")
    topology = preset("nvlink", 32).without_memory_limits()
    problem = Problem([Workload("prefill", np.array(counts)[3:15])], topology, step, num_replicas=32)
    solution = joint(problem, time_limit_s=FOREVER)
    check(problem, solution)
    assert problem.costs(solution.plan)[0].imbalance <= 1.02
    assert solution.gap <= 5e-3
    assert solution.plan.copies().max() <= 9
    packed = SOLVERS["eplb"](problem).plan
    assert (solution.plan.num_replicas == packed.num_replicas).all()  # replicas stay with whom they were


@pytest.mark.slow
def test_result_is_the_same_where_the_c_loop_was_not_built(monkeypatch):
    # By name: `moeflow.placement.solvers.joint` is the solver there, not its module.
    monkeypatch.setattr(sys.modules["moeflow.placement.solvers.joint"], "_NUM_PROPOSALS", 4)
    problems = [
        medium_problem(0, 2, links=1e6, num_gpus=5),
        medium_problem(0, 2, communication="dispatch", num_gpus=5, workloads=2, worst_case=True),
    ]
    built = [joint(problem, time_limit_s=FOREVER) for problem in problems]
    monkeypatch.setattr(anneal, "_c_loop", lambda: None)
    for problem, solution in zip(problems, built, strict=True):
        again = joint(problem, time_limit_s=FOREVER)
        assert again.plan == solution.plan
        assert again.objective == solution.objective
        assert again.status == solution.status


@pytest.mark.slow
@needs_c
def test_progress_rises_to_the_end():
    told = []
    joint(medium_problem(0), time_limit_s=FOREVER, progress=lambda done, what: told.append((done, what)))
    shares = [done for done, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert {what for _, what in told} == {"proving a bound", "annealing"}


@pytest.mark.parametrize("communication", ["path", "dispatch"])
def test_one_gpu_holds_everything_and_that_is_optimal(communication):
    solution = joint(medium_problem(0, communication=communication, num_gpus=1))
    assert solution.status == "optimal"
    assert (solution.plan.mask()).all()
