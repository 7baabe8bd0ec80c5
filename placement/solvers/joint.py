"""Load and communication in one objective, with a proven gap: exact where small, else annealing and a relaxation.

The method depends on the problem:

- small: an integer program of the whole (`exact.py`), whose optimum is proven.
- load alone (dispatch): a descent from the best of LPT and EPLB, with their replicas. Where that ends within half a
  percent of the bound nothing is annealed: the mix of heavy and light experts that heaviest-first packing leaves on
  each GPU holds where routing drifts, and annealing from a random start loses it (measured, docs/placement.md).
- paths of tokens: rounds of two annealings from a random placement, each round four times as long as the one before.
  One counts the slowest link of every layer. The other counts the mean over all links, which finds its way where paths
  are strongly structured and a maximum says nothing of the links below it, and then descends by the slowest. The
  semidefinite bound of `bounds/path.py` stands beside the LP's.
"""

import time

import numpy as np

from moeflow.placement.bounds.balance import balance_bound
from moeflow.placement.bounds.path import path_bound
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem, Solution
from moeflow.placement.solvers.baselines import Progress, greedy, random_placement
from moeflow.placement.solvers.eplb import eplb
from moeflow.placement.solvers.exact import exact, is_small
from moeflow.placement.solvers.search import Found, cool, descend
from moeflow.placement.tables import Tables

_ACCEPTED_GAP = 5e-3  # within which a problem of load alone is not annealed
_NUM_PROPOSALS = 500  # for each copy, in a descent and in the first annealing
_NUM_ROUNDS, _ROUND_GROWTH = 4, 4  # annealings, and how many times longer each is
_EXACT_SHARE, _BOUND_SHARE = 0.5, 0.3  # of the time limit, at most


def joint(problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0, progress: Progress | None = None) -> Solution:
    """Place experts for the least time of slowest GPUs and slowest links together, and prove the gap to the optimum.

    The same seed gives the same plan unless the time limit strikes; the status says so where it did.
    """
    begin = time.perf_counter()
    end = time.monotonic() + time_limit_s
    tell = progress or (lambda share, what: None)
    bound, bound_by = balance_bound(problem), "balance"
    best, ended = _Best(problem, greedy(problem, seed=seed).plan), True
    best.take(eplb(problem, seed=seed).plan)
    if is_small(problem):
        found = exact(problem, start=best.plan, time_limit_s=_EXACT_SHARE * time_limit_s, seed=seed)
        best.take(found.plan)
        if found.bound > bound:
            bound, bound_by = found.bound, "integer program"
        if best.objective <= bound * (1 + 1e-6):
            return _solution(problem, best, bound, bound_by, begin, ended)
    if problem.step.communication == "path" and problem.num_gpus > 1 and problem.num_layers > 1:
        proven = path_bound(
            Tables(problem),
            time_limit_s=_BOUND_SHARE * time_limit_s,
            progress=lambda share: tell(_BOUND_SHARE * share, "proving a bound"),
        )
        if proven > bound:
            bound, bound_by = proven, "semidefinite relaxation"
    ended = _improve(problem, best, bound, seed, end, tell)
    return _solution(problem, best, bound, bound_by, begin, ended)


class _Best:
    """The best plan so far, by the objective itself."""

    def __init__(self, problem: Problem, plan: Plan):
        self.problem, self.plan, self.objective = problem, plan, problem.objective(plan)

    def take(self, plan: Plan) -> None:
        """Keep a plan if it is better."""
        objective = self.problem.objective(plan)
        if objective < self.objective:
            self.plan, self.objective = plan, objective


def _improve(problem, best, bound, seed, end, tell) -> bool:
    """Search from the best plan so far; return whether every search ran to its end."""
    weights = np.full(len(problem.workloads), 1 / len(problem.workloads))
    copies = problem.num_layers * (problem.num_experts + problem.num_replicas)
    if int(best.plan.num_replicas.sum()) == copies:  # packing may have found no room for a replica
        tables = Tables(problem, weights, may_replicate=False, slowest=True)
        found = descend(tables, best.plan, _NUM_PROPOSALS * copies, seed=seed, deadline=end)
        best.take(found.plan)
        if problem.step.communication == "dispatch" and best.objective <= bound * (1 + _ACCEPTED_GAP):
            return found.ended
    start, took = random_placement(problem, seed=seed).plan, 0.0
    for turn in range(2 * _NUM_ROUNDS):
        number, mean = divmod(turn, 2)
        begin = time.monotonic()
        if begin + (took if mean else _ROUND_GROWTH * took) > end:
            return False
        found = _cool(
            Tables(problem, weights, slowest=not mean),
            start,
            _NUM_PROPOSALS * _ROUND_GROWTH**number * copies // 2,
            seed + number,
            end,
            lambda share, turn=turn: tell(
                _BOUND_SHARE + (1 - _BOUND_SHARE) * (turn + share) / (2 * _NUM_ROUNDS), "annealing"
            ),
        )
        best.take(found.plan)
        if not found.ended:
            return False
        took = time.monotonic() - begin
        if problem.worst_case:  # slower workloads weigh more in the next round
            seconds = np.array([cost.step_s for cost in problem.costs(best.plan)])
            weights = weights * (seconds / seconds.mean()) ** 8
            weights /= weights.sum()
    return True


def _cool(tables, start, proposals, seed, end, progress) -> Found:
    """Anneal; where the mean over the links counted, descend by the slowest afterwards."""
    found = cool(tables, start, proposals, seed=seed, deadline=end, progress=progress)
    if tables.traffic is None:
        return found
    slowest = Tables(tables.problem, tables.weights, slowest=True)
    return descend(slowest, found.plan, proposals, seed=seed, deadline=end)


def _solution(problem, best, bound, bound_by, begin, ended) -> Solution:
    problem.check(best.plan)
    optimal = best.objective <= bound * (1 + 1e-6)
    status = "optimal" if optimal else "feasible" if ended else "time limit"
    seconds = time.perf_counter() - begin
    return Solution("joint", best.plan, best.objective, min(bound, best.objective), bound_by, seconds, status)
