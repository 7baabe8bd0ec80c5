"""The solver that pulp runs on an integer program, and the bound that it proves.

HiGHS where highspy is installed, else CBC, which pulp ships. One thread and one seed: the same program and seed give
the same answer unless the time limit stops the search. Ctrl-C ends a solver while it works; it leaves no process,
thread or file.
"""

import importlib.util
import math
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pulp

from moeflow.errors import PlacementError

SOLVERS = ("auto", "highs", "cbc")
_MAX_SEED = 2**31 - 1  # both solvers take a non-negative 32-bit number


def pulp_solver(
    name: str = "auto", *, time_limit_s: float = 60.0, gap: float = 0.0, seed: int = 0, warm_start: bool = False
) -> pulp.LpSolver:
    """Return pulp's solver for a program.

    Args:
        name: "highs", "cbc", or "auto": HiGHS where it is installed, else CBC.
        time_limit_s: seconds after which it returns the best it has.
        gap: (objective - bound) / objective at which to stop; 0 asks for the optimum.
        seed: of its random choices.
        warm_start: whether to start at the variables' initial values; every variable needs one then.

    Raises:
        PlacementError: an unknown name, or a solver that is not installed.
    """
    if name not in SOLVERS:
        raise PlacementError(f"solver {name!r} is unknown. Allowed: {', '.join(SOLVERS)}.")
    highs = importlib.util.find_spec("highspy") is not None
    if name == "highs" and not highs:
        raise PlacementError("solver 'highs' is not installed. Run `pip install highspy`, or take 'cbc'.")
    seed, time_limit_s = seed % _MAX_SEED, max(time_limit_s, 1e-3)
    if name == "highs" or (name == "auto" and highs):
        return _highs(warm_start)(msg=False, threads=1, timeLimit=time_limit_s, gapRel=gap, random_seed=seed)
    options = [f"randomSeed {seed}", f"randomCbcSeed {seed}"]
    cbc = _Cbc(msg=False, threads=1, timeLimit=time_limit_s, gapRel=gap, warmStart=warm_start, options=options)
    if not cbc.available():
        raise PlacementError(
            "no solver of integer programs is installed: pulp ships no CBC for this machine. Run `pip install highspy`."
        )
    return cbc


def solver_name(solver: pulp.LpSolver) -> str:
    """Return the name, "highs" or "cbc", that a solver of `pulp_solver` goes by."""
    return "cbc" if isinstance(solver, pulp.PULP_CBC_CMD) else "highs"


def found_solution(program: pulp.LpProblem) -> bool:
    """Return whether a solved program has values, the best or the best in time."""
    return program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)


def proven_bound(program: pulp.LpProblem) -> float:
    """Return a lower bound of a minimised program, that its solver proved; -inf where it reports none.

    CBC gives pulp no bound; where it reached the requested gap, the bound is that gap below its solution.
    """
    model = getattr(program, "solverModel", None)
    if model is not None:
        info = model.getInfo()
        constant = program.objective.constant  # pulp keeps it from HiGHS
        bound = info.mip_dual_bound if program.isMIP() else info.objective_function_value
        return bound + constant if math.isfinite(bound) and found_solution(program) else -math.inf
    if program.sol_status != pulp.LpSolutionOptimal:
        return -math.inf
    found = pulp.value(program.objective)
    return found - (program.solver.optionsDict.get("gapRel") or 0.0) * abs(found)


class _Cbc(pulp.PULP_CBC_CMD):
    """pulp's CBC, whose process and files end with the solving however that ends."""

    def actualSolve(self, lp: pulp.LpProblem, **options: Any) -> int:
        with tempfile.TemporaryDirectory(prefix="moeflow-cbc-") as self.tmpDir:
            try:
                return super().actualSolve(lp, **options)
            except BaseException:
                _end_children_naming(self.tmpDir)
                raise


def _end_children_naming(folder: str) -> None:
    """Kill the child processes whose command line names a folder: pulp does not hand out the process it starts."""
    for child in psutil.Process().children():
        try:
            if any(folder in argument for argument in child.cmdline()):
                child.kill()
                child.wait()
        except psutil.NoSuchProcess:
            continue


def _highs(warm_start: bool) -> type[pulp.LpSolver]:
    """Return pulp's HiGHS, silent and with a start; defined here since highspy may be absent."""
    import highspy

    class SilentHighs(highspy.Highs):
        def enableCallbacks(self) -> None:
            self.setOptionValue("output_flag", False)  # before the first callback, which prints a banner
            super().enableCallbacks()

    class PulpHighs(pulp.HiGHS):
        def createAndConfigureSolver(self, lp: pulp.LpProblem) -> None:
            lp.solverModel = SilentHighs()
            lp.solverModel.HandleUserInterrupt = True
            options = {"threads": self.threads, "time_limit": float(self.timeLimit), "mip_rel_gap": self.gapRel}
            for option, value in {"output_flag": False, **options, **self.optionsDict}.items():
                lp.solverModel.setOptionValue(option, value)

        def callSolver(self, lp: pulp.LpProblem) -> None:
            if warm_start:
                start = highspy.HighsSolution()
                start.col_value = [float(variable.value()) for variable in lp.variables()]
                lp.solverModel.setSolution(start)
            # In a thread of its own: a call into C in the main thread would keep Ctrl-C waiting until it is done.
            with ThreadPoolExecutor(1, thread_name_prefix="highs") as pool:
                try:
                    pool.submit(lp.solverModel.run).result()
                except BaseException:
                    lp.solverModel.cancelSolve()
                    raise  # once the thread has ended

    return PulpHighs
