"""Several solvers on one problem: they share the time, and one without a plan does not stop the others."""

import numpy as np
import pytest

from moeflow.errors import PlacementError
from moeflow.placement.cost import StepShape
from moeflow.placement.problem import Problem
from moeflow.placement.solve import solve_all
from moeflow.placement.solvers.baselines import contiguous, greedy
from moeflow.placement.topology import preset
from moeflow.placement.workload import Workload


def test_a_solver_without_a_plan_is_told_and_the_others_go_on():
    def refuses(problem, **options):
        raise PlacementError("not today")

    load = np.random.default_rng(0).random((2, 6)) + 1
    problem = Problem((Workload("a", load),), preset("pcie", 2), StepShape(communication="dispatch"))
    attempts = solve_all(problem, {"contiguous": contiguous, "refuses": refuses, "greedy": greedy})
    assert [solution.solver for solution in attempts.solutions] == ["contiguous", "greedy"]
    assert attempts.failures == {"refuses": "not today"}
    with pytest.raises(PlacementError, match=r"no solver found a plan\. refuses: not today"):
        solve_all(problem, {"refuses": refuses})


def test_time_is_shared_and_the_last_solver_has_what_is_left():
    limits, shares = {}, []

    def recorded(name):
        def solve(problem, *, seed, time_limit_s, progress):
            limits[name] = time_limit_s
            progress(0.5, "half")
            return contiguous(problem, seed=seed)

        return solve

    problem = Problem((Workload("a", np.ones((2, 6))),), preset("pcie", 2), StepShape(communication="dispatch"))
    solvers = {name: recorded(name) for name in ("one", "two", "last")}
    solve_all(problem, solvers, time_limit_s=100, progress=lambda share, text: shares.append((share, text)))
    assert limits["one"] == limits["two"] == 30
    assert 90 < limits["last"] <= 100
    assert [share for share, _ in shares] == sorted(share for share, _ in shares)
    assert shares[-1][0] == 1
    assert (pytest.approx(0.65), "last: half") in shares
