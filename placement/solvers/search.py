"""Searches over placements: descents, and annealings from hot to cold. `Annealing` runs them, in steps that can stop.

Temperatures are shares of a copy's average cost, so that problems of any size cool alike.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from moeflow.placement.plan import Plan
from moeflow.placement.solvers.anneal import Annealing
from moeflow.placement.tables import Tables

HOT, COLD = 0.7, 0.02  # temperatures: most changes are kept at the first, hardly any at the second
_NUM_STEPS = 200  # temperatures of a search, and its checks of the deadline


class Found(NamedTuple):
    """The result of a search.

    Args:
        plan: the placement.
        ended: whether the search ended before the deadline.
    """

    plan: Plan
    ended: bool


def descend(tables: Tables, plan: Plan, num_proposals: int, *, seed: int = 0, deadline: float = float("inf")) -> Found:
    """Descend from a plan: keep only changes that do not cost.

    Args:
        tables: the problem.
        plan: the first placement.
        num_proposals: changes to try.
        seed: of the random numbers.
        deadline: `time.monotonic()` at which the search stops with its plan so far.
    """
    return _search(tables, plan, num_proposals, lambda share: 0.0, seed, deadline, None)


def cool(
    tables: Tables,
    plan: Plan,
    num_proposals: int,
    *,
    seed: int = 0,
    hot: float = HOT,
    deadline: float = float("inf"),
    progress: Callable[[float], None] | None = None,
) -> Found:
    """Anneal: keep changes that cost with a probability that falls until only descent is left.

    Args:
        tables: the problem.
        plan: the first placement; soon forgotten at the default `hot`.
        num_proposals: changes to try.
        seed: of the random numbers.
        hot: the first temperature.
        deadline: `time.monotonic()` at which to stop. A search that is hot then descends for a moment longer.
        progress: called with the share done.
    """
    begin = Annealing(tables, plan)
    scale = begin.objective() / begin.copy_expert.size
    return _search(
        tables, plan, num_proposals, lambda share: scale * hot * (COLD / hot) ** share, seed, deadline, progress
    )


def _search(tables, plan, num_proposals, temperature, seed, deadline, progress) -> Found:
    annealing = Annealing(tables, plan, seed)
    each, step = max(num_proposals // _NUM_STEPS, 1), 0
    while step < _NUM_STEPS and time.monotonic() < deadline:
        annealing.run(each, temperature(step / _NUM_STEPS))
        step += 1
        if progress is not None:
            progress(step / _NUM_STEPS)
    if step < _NUM_STEPS or temperature(1.0) > 0:
        annealing.run(4 * each, 0.0)
    return Found(annealing.plan(), step == _NUM_STEPS)
