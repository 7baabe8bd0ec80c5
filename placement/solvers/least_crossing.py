"""Fewest transitions that change GPU under a limit of imbalance: MoETuner's two aims, one of them bounded.

Crossing + weight * imbalance is annealed for several weights; the plans along the way are a Pareto curve, and the best
within the limit is the answer. The bound is Lagrange's: where crossing + weight * imbalance is at least J for every
plan, crossing is at least J - weight * limit for those within it.

Here tokens count, as in tables, not seconds: all GPUs and all links are taken to be equal.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from moeflow.errors import PlacementError
from moeflow.placement.bounds.balance import balance_bound
from moeflow.placement.bounds.path import path_bound
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem, Solution
from moeflow.placement.solvers.baselines import Progress, greedy, random_placement
from moeflow.placement.solvers.search import HOT, cool
from moeflow.placement.tables import Tables
from moeflow.placement.topology import Topology

_NUM_PROPOSALS, _LAST_GROWTH = 1000, 12  # for each copy in a short search; the last searches are so many times longer
_MAX_WEIGHT = 4.0  # beyond it only balance counts
_NUM_HALVINGS = 7
_WEIGHT_FACTORS = (1.0, 0.96, 0.92, 0.88, 1.04, 1.08)  # of the weight that short searches find, for the long ones
_WARM_TEMPERATURE = 0.1  # a temperature that keeps to a plan's neighbourhood
_WEIGHT_STEP, _MAX_STEPS, _MAX_MISSES = 0.95, 40, 5  # of the walk along the curve; misses in a row
_EVEN_WEIGHT = 1e3  # so large that only balance counts
_MAX_TRIES = 20  # searches at that weight, where no plan keeps the limit
_BOUND_SHARE = 0.3  # of the time limit
_ROUNDING = 1 + 1e-9  # even load may come out as a little above 1


class Point(NamedTuple):
    """A plan on the curve.

    Args:
        plan: the placement.
        weight: of imbalance against crossing, where it was found.
        crossing: share of transitions that change GPU, mean over the workloads.
        imbalance: tokens of the busiest GPU over the mean, mean over layers and workloads.
    """

    plan: Plan
    weight: float
    crossing: float
    imbalance: float


class LeastCrossing(NamedTuple):
    """The plan with the least crossing, and its bound.

    Args:
        point: the plan with the least crossing found within the limit.
        bound: no plan within the limit crosses less.
        seconds: the search's time.
        status: "feasible", or "time limit".
        curve: the other plans of the Pareto curve found, by rising imbalance.
    """

    point: Point
    bound: float
    seconds: float
    status: str
    curve: tuple[Point, ...]

    @property
    def gap(self) -> float:
        """(crossing - bound) / bound; infinite where the bound is 0."""
        return (self.point.crossing - self.bound) / self.bound if self.bound > 0 else float("inf")


def least_crossing(
    problem: Problem,
    max_imbalance: float,
    *,
    seed: int = 0,
    time_limit_s: float = 60.0,
    progress: Callable[[float, str], None] | None = None,
) -> LeastCrossing:
    """Find the plan with the least crossing whose imbalance is at most a limit.

    Args:
        problem: workloads with transitions, slots and replicas; speeds and bandwidths are ignored.
        max_imbalance: 1 or more.
        seed: of the random numbers.
        time_limit_s: after which the best plan so far is returned.
        progress: called with the share done and the present task.

    Raises:
        PlacementError: a limit below 1, no transitions, or no plan found within the limit.
    """
    if not max_imbalance >= 1:
        raise PlacementError(f"an imbalance of at most {max_imbalance} was asked for. Even load is 1: give 1 or more.")
    begin, end = time.monotonic(), time.monotonic() + time_limit_s
    tell = progress or (lambda share, what: None)
    curve = _Curve(problem)
    curve.add(greedy(curve.problem, seed=seed).plan, _MAX_WEIGHT)
    search_end = end - _BOUND_SHARE * time_limit_s
    weight = _find_weight(curve, max_imbalance, seed, search_end, tell)
    for number, factor in enumerate(_WEIGHT_FACTORS):
        tell(0.3 + 0.6 * number / len(_WEIGHT_FACTORS), "annealing")
        curve.anneal(factor * weight, _LAST_GROWTH * _NUM_PROPOSALS, seed + number, search_end)
    _walk(curve, max_imbalance, seed, search_end)
    if problem.num_replicas:  # replicas even out load; where paths count they can be in the way
        curve.anneal(weight, _LAST_GROWTH * _NUM_PROPOSALS, seed, search_end, replicas=False)
    for number in range(_MAX_TRIES):
        if curve.within(max_imbalance):
            break
        curve.anneal(_EVEN_WEIGHT, _NUM_PROPOSALS, seed + number, search_end)
    within = curve.within(max_imbalance)
    if not within:
        least = min(point.imbalance for point in curve.points)
        raise PlacementError(
            f"no plan was found with an imbalance of at most {max_imbalance}; the most even one has {least:.4f}. Allow "
            "that much, or more replicas or time."
        )
    best = min(within, key=lambda point: (point.crossing, point.imbalance))
    tell(0.9, "proving a bound")
    bound = max(curve.least(weight, end - time.monotonic()) - weight * max_imbalance * _ROUNDING, 0.0)
    status = "feasible" if time.monotonic() < end else "time limit"
    return LeastCrossing(best, min(bound, best.crossing), time.monotonic() - begin, status, curve.pareto())


@dataclass(frozen=True)
class CrossingSolution(Solution):
    """A `Solution` of a search for the least crossing.

    Args:
        crossing: share of transitions that change GPU.
        crossing_bound: no plan within the limit of imbalance crosses less.
        max_imbalance: the limit.
    """

    crossing: float = 1.0
    crossing_bound: float = 0.0
    max_imbalance: float = 1.0


def crossing_solver(max_imbalance: float) -> Callable[..., CrossingSolution]:
    """Return `least_crossing` with a solver's signature; its plan is judged by time too."""

    def crossing(
        problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0, progress: Progress | None = None
    ) -> CrossingSolution:
        found = least_crossing(problem, max_imbalance, seed=seed, time_limit_s=time_limit_s, progress=progress)
        bound, objective = balance_bound(problem), problem.objective(found.point.plan)
        status = "optimal" if objective <= bound * (1 + 1e-9) else found.status
        return CrossingSolution(
            "crossing",
            found.point.plan,
            objective,
            min(bound, objective),
            "balance",
            found.seconds,
            status,
            found.point.crossing,
            found.bound,
            max_imbalance,
        )

    return crossing


def pareto_curve(
    problem: Problem,
    weights: Sequence[float],
    *,
    seed: int = 0,
    time_limit_s: float = 600.0,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[Point, ...]:
    """Return the Pareto curve found of crossing and imbalance, by rising imbalance.

    Args:
        problem: as in `least_crossing`.
        weights: of imbalance against crossing; each gives a search.
        seed: of the random numbers.
        time_limit_s: after which no search begins.
        progress: called with the share done and the present task.
    """
    curve, end = _Curve(problem), time.monotonic() + time_limit_s
    for number, weight in enumerate(weights):
        curve.anneal(weight, 4 * _NUM_PROPOSALS, seed + number, end)
        if progress is not None:
            progress((number + 1) / len(weights), "annealing")
    return curve.pareto()


def crossing_bounds(problem: Problem, weights: Sequence[float], limits: Sequence[float]) -> list[float]:
    """Return, for each limit of imbalance, a lower bound on the crossing of every plan within it.

    Args:
        problem: as in `least_crossing`.
        weights: of imbalance against crossing; each proves a line below the curve, and the highest of them counts.
        limits: 1 or more each.
    """
    curve = _Curve(problem)
    lines = [(weight, curve.least(weight)) for weight in weights]
    return [max(least - weight * limit for weight, least in lines) for limit in limits]


class _Curve:
    """The plans found so far, and the problem of equal GPUs and links that the searches use."""

    def __init__(self, problem: Problem) -> None:
        if any(workload.transitions is None or not workload.transitions.any() for workload in problem.workloads):
            raise PlacementError("crossing needs transitions between layers, and counts have none. Give a trace.")
        gpus = tuple(replace(gpu, flops_per_s=1e12, memory_bytes_per_s=1e30) for gpu in problem.topology.gpus)
        alike = Topology("alike", gpus, np.full(2 * (problem.num_gpus,), 1e9))
        self.problem = replace(problem, topology=alike, step=replace(problem.step, communication="path"))
        self.points: list[Point] = []
        tables = Tables(self.problem)
        assert tables.traffic is not None, "a problem by path, with the mean over the links"
        self.all_crossing = float(tables.traffic.sum())  # seconds where every transition crosses
        self.all_even = float((tables.tokens[0].sum() * tables.arithmetic_s[0]) / problem.num_gpus)

    def tables(self, weight: float, problem: Problem) -> Tables:
        """Return a problem whose seconds are crossing + weight * imbalance, in units of `all_crossing`."""
        return Tables(problem, balance=weight * self.all_crossing / self.all_even)

    def add(self, plan: Plan, weight: float) -> Point:
        """Judge a plan and keep it."""
        costs = self.problem.costs(plan)
        # A workload without transitions between two layers counts less, as it does in the traffic that is searched.
        weights = [cost.known_path_bytes().sum() for cost in costs]
        crossing = float(np.average([cost.crossing for cost in costs], weights=weights))
        self.points.append(Point(plan, weight, crossing, float(np.mean([cost.imbalance for cost in costs]))))
        return self.points[-1]

    def anneal(
        self, weight: float, proposals: int, seed: int, end: float, *, replicas: bool = True, start: Plan | None = None
    ) -> Point | None:
        """Search at one weight, with or without replicas, near a plan or anywhere; None where no time is left."""
        if time.monotonic() >= end:
            return None
        problem = self.problem if replicas else replace(self.problem, num_replicas=0)
        hot = HOT if start is None else _WARM_TEMPERATURE
        start = start or random_placement(problem, seed=seed).plan
        copies = problem.num_layers * (problem.num_experts + problem.num_replicas)
        found = cool(self.tables(weight, problem), start, proposals * copies, seed=seed, hot=hot, deadline=end)
        return self.add(found.plan, weight)

    def within(self, max_imbalance: float) -> list[Point]:
        """Return the found plans within a limit."""
        return [point for point in self.points if point.imbalance <= max_imbalance * _ROUNDING]

    def least(self, weight: float, time_limit_s: float = float("inf")) -> float:
        """Return a lower bound on crossing + weight * imbalance of every plan."""
        if self.problem.num_gpus == 1:
            return weight
        return path_bound(self.tables(weight, self.problem), time_limit_s=max(time_limit_s, 0.0)) / self.all_crossing

    def pareto(self) -> tuple[Point, ...]:
        """Return the Pareto-optimal plans, by rising imbalance."""
        best, out = float("inf"), []
        for point in sorted(self.points, key=lambda point: (point.imbalance, point.crossing)):
            if point.crossing < best:
                best = point.crossing
                out.append(point)
        return tuple(out)


def _walk(curve, max_imbalance, seed, end) -> None:
    """Give up balance from the best plan on, in small steps up to the limit, to pass the curve's jumps."""
    within = curve.within(max_imbalance)
    if not within:
        return
    point, missed = min(within, key=lambda point: point.crossing), 0
    for step in range(_MAX_STEPS):
        found = curve.anneal(point.weight * _WEIGHT_STEP, _NUM_PROPOSALS, seed + step, end, start=point.plan)
        if found is None or missed == _MAX_MISSES:
            return
        if found in curve.within(max_imbalance) and found.crossing < point.crossing:
            point, missed = found, 0
        else:
            point, missed = point._replace(weight=point.weight * _WEIGHT_STEP), missed + 1


def _find_weight(curve, max_imbalance, seed, end, tell) -> float:
    """Find the least weight that keeps the limit by halving the range around it."""
    free = curve.anneal(0.0, _NUM_PROPOSALS, seed, end)
    if free is None or free.imbalance <= max_imbalance * _ROUNDING:
        return 0.0
    low, high = 0.01, _MAX_WEIGHT
    for number in range(_NUM_HALVINGS):
        tell(0.3 * number / _NUM_HALVINGS, "weighing balance")
        weight = float(np.sqrt(low * high))
        point = curve.anneal(weight, _NUM_PROPOSALS, seed, end)
        if point is None:
            break
        low, high = (low, weight) if point.imbalance <= max_imbalance * _ROUNDING else (weight, high)
    return high
