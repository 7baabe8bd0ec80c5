"""The solvers behind pulp: each finds and proves the optimum, says nothing, and ends with all it started."""

import os
import signal
import subprocess
import sys
import tempfile
import threading

import psutil
import pulp
import pytest

from moeflow.errors import PlacementError
from moeflow.integer_program import found_solution, proven_bound, pulp_solver


def knapsack():
    program = pulp.LpProblem("knapsack", pulp.LpMinimize)
    worth, weight = [6, 5, 8, 9, 6, 7, 3], [2, 3, 6, 7, 5, 9, 4]
    x = [pulp.LpVariable(f"x_{i}", cat=pulp.LpBinary) for i in range(7)]
    program.setObjective(100 - pulp.lpSum(v * w for v, w in zip(x, worth, strict=True)))
    program.addConstraint(pulp.lpSum(v * w for v, w in zip(x, weight, strict=True)) <= 9)
    for variable in x:
        variable.setInitialValue(0)
    return program


@pytest.mark.parametrize("name", ["auto", "highs", "cbc"])
@pytest.mark.parametrize("warm_start", [False, True])
def test_each_solver_finds_and_proves_the_optimum(name, warm_start):
    program = knapsack()
    program.solve(pulp_solver(name, time_limit_s=3600, seed=3, warm_start=warm_start))
    assert found_solution(program)
    assert pulp.value(program.objective) == pytest.approx(85)
    assert 85 - 1e-3 <= proven_bound(program) <= 85 + 1e-6


def test_solver_that_is_not_there_is_refused_with_what_to_install(monkeypatch):
    with pytest.raises(PlacementError, match="Allowed: auto, highs, cbc"):
        pulp_solver("gurobi")
    monkeypatch.setitem(sys.modules, "highspy", None)  # as if not installed
    with pytest.raises(PlacementError, match="pip install highspy"):
        pulp_solver("highs")
    assert isinstance(pulp_solver("auto"), pulp.PULP_CBC_CMD)


def test_solvers_print_nothing():
    code = (
        "import pulp; from moeflow.integer_program import pulp_solver\n"
        "for name in ('highs', 'cbc'):\n"
        "    p = pulp.LpProblem('p'); x = pulp.LpVariable('x', 1); p.setObjective(x + 0.0); p.solve(pulp_solver(name))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout == ran.stderr == ""


def even_split(num_items: int, num_parts: int) -> pulp.LpProblem:
    """A program that takes far longer than a test may: the most even split of many weights."""
    program = pulp.LpProblem("split", pulp.LpMinimize)
    parts = range(num_parts)
    x = [[pulp.LpVariable(f"x_{i}_{part}", cat=pulp.LpBinary) for part in parts] for i in range(num_items)]
    heaviest = pulp.LpVariable("heaviest", 0)
    program.setObjective(heaviest + 0.0)
    for row in x:
        program += pulp.lpSum(row) == 1
    for part in parts:
        program += pulp.lpSum((1 + i**0.5) * row[part] for i, row in enumerate(x)) <= heaviest
    return program


@pytest.mark.parametrize("name", ["highs", "cbc"])
def test_interrupted_solver_leaves_no_process_thread_or_file(name, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    children = set(psutil.Process().children())

    def at_work() -> bool:
        if name == "cbc":
            return any("cbc" in child.name() for child in set(psutil.Process().children()) - children)
        new = {thread.native_id for thread in set(threading.enumerate()) - threads}
        return any(thread.id in new and thread.user_time > 0.1 for thread in psutil.Process().threads())

    def interrupt():
        while not at_work():
            pass
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    threads = {interrupter, *threading.enumerate()}
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        even_split(40, 7).solve(pulp_solver(name, time_limit_s=600))
    interrupter.join()
    assert set(threading.enumerate()) <= threads
    assert set(psutil.Process().children()) <= children
    assert not list(tmp_path.iterdir())
