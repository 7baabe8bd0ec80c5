"""Several solvers on one problem: they share the time, and the best bound that one proves holds for all."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moeflow.errors import PlacementError
from moeflow.placement.problem import Problem, Solution
from moeflow.placement.solvers.baselines import Progress

_EARLY_SOLVER_SHARE = 0.3  # of the time limit, for each solver but the last; early solvers hardly use theirs


@dataclass(frozen=True)
class Attempts:
    """The results of several solvers on one problem.

    Args:
        solutions: of the solvers that found a plan, in their order.
        failures: solver -> the reason why it found none.
    """

    solutions: tuple[Solution, ...]
    failures: dict[str, str]

    @property
    def best(self) -> Solution:
        """The solution with the least objective; the first of equals."""
        return min(self.solutions, key=lambda solution: solution.objective)


def solve_all(
    problem: Problem,
    solvers: dict[str, Callable[..., Solution]],
    *,
    seed: int = 0,
    time_limit_s: float = 60.0,
    progress: Progress | None = None,
) -> Attempts:
    """Solve a problem with each solver in turn; the last has all the time that the others leave.

    Ctrl-C ends the solving between two steps of the solver at work, each a small share of the time limit. So does an
    exception that `progress` raises. Neither leaves a process, a thread or a temporary file of a solver.

    Args:
        problem: the placement problem.
        solvers: name -> solver; the one that gains most from time goes last.
        seed: of each solver.
        time_limit_s: for all solvers together.
        progress: called with the share that is done, 0 to 1, and the present task.

    Raises:
        PlacementError: no solver found a plan.
    """
    begin = time.perf_counter()
    solutions, failures = [], {}
    shares = _shares(len(solvers))
    for number, (name, solve) in enumerate(solvers.items()):
        before, share = sum(shares[:number]), shares[number]
        left = max(time_limit_s - (time.perf_counter() - begin), 0.0)
        limit = left if number == len(solvers) - 1 else min(left, _EARLY_SOLVER_SHARE * time_limit_s)
        _tell(progress, before, name)
        try:
            solution = solve(
                problem,
                seed=seed,
                time_limit_s=limit,
                progress=lambda done, text, at=before, of=share, who=name: _tell(progress, at + of * done, who, text),
            )
        except PlacementError as error:
            failures[name] = str(error)
        else:
            problem.check(solution.plan)
            solutions.append(solution)
    if not solutions:
        raise PlacementError("no solver found a plan. " + " ".join(f"{name}: {why}" for name, why in failures.items()))
    _tell(progress, 1.0, "done")
    return Attempts(tuple(_with_best_bound(solutions)), failures)


def _with_best_bound(solutions: Sequence[Solution]) -> list[Solution]:
    best = max(solutions, key=lambda solution: solution.bound)
    solutions = [replace(solution, bound=best.bound, bound_by=best.bound_by) for solution in solutions]
    return [replace(solution, status="optimal") if solution.gap == 0 else solution for solution in solutions]


def _shares(num_solvers) -> list[float]:
    """Return each solver's share of the bar: little for the quick ones, most for the last."""
    return [0.3 / max(num_solvers - 1, 1)] * (num_solvers - 1) + [0.7 if num_solvers > 1 else 1.0]


def _tell(progress, share, name, text="") -> None:
    if progress is not None:
        progress(min(share, 1.0), f"{name}: {text}" if text and name not in text else text or name)
