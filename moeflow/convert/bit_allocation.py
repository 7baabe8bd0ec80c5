"""Chooses a width for each expert by a 0-1 program over all layers at once, within one budget of bytes.

    minimise sum cost[l, e, j] x[l, e, j]   with   sum_j x[l, e, j] = 1,   sum bytes[l, e, j] x[l, e, j] <= budget

Its linear relaxation is solved exactly by taking steps along each expert's convex hull in the order of what a byte
buys. That gives a price of a byte, and any price p >= 0 proves a bound: sum over experts of min_j (cost + p * bytes),
less p * budget, is at most the cost of every allocation. Widths whose cost at that price exceeds an expert's best by
more than the open gap are in no better allocation; the solver gets what is left.

Knows numbers. Knows nothing of formats, tensors or models.
"""

import logging
import time
from typing import NamedTuple

import numpy as np

from moeflow.errors import BudgetError, ConfigError, PlacementError

logger = logging.getLogger(__name__)

SOLVERS = ("auto", "highs", "cbc")


class Allocation(NamedTuple):
    """One width for each expert.

    Args:
        choice: [L, E] int64, the chosen width's place in the last axis of `costs`.
        cost: sum of the chosen costs.
        bound: no allocation within the budget costs less.
        gap: (cost - bound) / bound; 0 where both are 0.
        num_bytes: sum of the chosen bytes.
        seconds: time it took, with building the program.
        solver: what found the choice: "hull" (the relaxation, rounded), "highs" or "cbc".
    """

    choice: np.ndarray
    cost: float
    bound: float
    gap: float
    num_bytes: int
    seconds: float
    solver: str


def allocate(
    costs: np.ndarray,
    num_bytes: np.ndarray,
    budget_bytes: int,
    *,
    gap: float = 1e-4,
    time_limit_s: float = 60.0,
    solver: str = "auto",
) -> Allocation:
    """Choose one width for each expert so that the summed cost is least within a budget.

    Args:
        costs: [L, E, B] finite, >= 0: what expert e of layer l costs in quality at width j. Layers of fewer experts
            are filled up with experts of cost 0 and bytes 0.
        num_bytes: [B] or [L, E, B] whole numbers >= 0: what it takes.
        budget_bytes: what all experts together may take.
        gap: (cost - bound) / bound at which to stop; 0 asks for the optimum.
        time_limit_s: for the solver. The best found until then is returned, with its gap.
        solver: "auto" rounds the relaxation and, where its gap is too wide, hands what is open to HiGHS, or to CBC if
            HiGHS is not installed; "highs" and "cbc" give that solver the whole program, with the rounding as a start.

    Raises:
        BudgetError: the budget is below the smallest allocation.
        ConfigError: a cost is negative, NaN or infinite, shapes disagree, or the solver is unknown.

    Source: one width an expert by a 0-1 program is MC-MoE (arXiv 2410.06270, section 3.2), there for each layer alone.
    """
    begin = time.perf_counter()
    costs, sizes = _checked(costs, num_bytes, budget_bytes)
    if solver not in SOLVERS:
        raise ConfigError(f"solver={solver!r} is unknown. Allowed: {', '.join(SOLVERS)}.")
    shape, width = costs.shape[:-1], costs.shape[-1]
    costs, sizes = costs.reshape(-1, width), sizes.reshape(-1, width)

    choice, price = _rounded_relaxation(costs, sizes, budget_bytes)
    bound = dual_bound(costs, sizes, budget_bytes, price)
    cost, found_by = float(_total(costs, choice)), "hull"
    if solver != "auto" or relative_gap(cost, bound) > gap:
        open_widths = ~_dominated(costs, sizes)
        if solver == "auto":
            open_widths &= _reduced(costs, sizes, price) <= (cost - bound) * (1 + 1e-9)
        open_widths[np.arange(len(choice)), choice] = True
        found = _solve(costs, sizes, budget_bytes, open_widths, choice, gap, time_limit_s, solver)
        if found is not None and (found_cost := float(_total(costs, found[0]))) <= cost:
            (choice, found_by), cost = found, found_cost
    return Allocation(
        choice=choice.reshape(shape),
        cost=cost,
        bound=min(bound, cost),  # at the optimum they are two sums of equal value, rounded in another order
        gap=relative_gap(cost, bound),
        num_bytes=int(_total(sizes, choice)),
        seconds=time.perf_counter() - begin,
        solver=found_by,
    )


def dual_bound(costs: np.ndarray, num_bytes: np.ndarray, budget_bytes: int, price: float) -> float:
    """Return a cost that no allocation within the budget is below, whatever the price of a byte (>= 0).

    Args:
        costs: [..., B].
        num_bytes: [..., B].
        budget_bytes: what all may take.
        price: cost a byte; the relaxation's own gives its optimum, the best such bound.
    """
    return float(np.maximum((costs + price * num_bytes).min(axis=-1).sum() - price * budget_bytes, 0.0))


def relative_gap(cost: float, bound: float) -> float:
    """Return (cost - bound) / bound, and 0 where they are equal."""
    if cost <= bound:
        return 0.0
    return (cost - bound) / bound if bound > 0 else float("inf")


def _checked(costs: np.ndarray, num_bytes: np.ndarray, budget_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    costs = np.asarray(costs, np.float64)
    if costs.ndim != 3 or not costs.size:
        raise ConfigError(f"costs have shape {list(costs.shape)}. Give [layers, experts, widths], none of them 0.")
    bad = np.argwhere(~(np.isfinite(costs) & (costs >= 0)))
    if len(bad):
        layer, expert, width = bad[0]
        raise ConfigError(
            f"layer {layer}, expert {expert} costs {costs[tuple(bad[0])]} at width number {width}. "
            "Costs are finite and not negative: measure that expert again."
        )
    sizes = np.asarray(num_bytes)
    if sizes.shape not in (costs.shape, costs.shape[-1:]) or (sizes < 0).any() or (sizes != np.floor(sizes)).any():
        raise ConfigError(
            f"bytes have shape {list(sizes.shape)} and begin {sizes.min() if sizes.size else 'nowhere'}. Give whole "
            f"numbers from 0 up, [{costs.shape[-1]}] or {list(costs.shape)}."
        )
    sizes = np.broadcast_to(sizes.astype(np.int64), costs.shape)
    least, most = int(sizes.min(axis=-1).sum()), int(sizes.max(axis=-1).sum())
    if not budget_bytes >= least:
        raise BudgetError(
            f"a budget of {budget_bytes} bytes is below the smallest allocation. All experts at their smallest width "
            f"take {least} bytes, at their largest {most}: give {least} or more, or allow smaller widths."
        )
    return costs, sizes


def _rounded_relaxation(costs: np.ndarray, sizes: np.ndarray, budget: int) -> tuple[np.ndarray, float]:
    """Return an allocation within the budget, and the price of a byte at the relaxation's optimum."""
    choice, steps = _hull_steps(costs, sizes)
    slack = budget - int(_total(sizes, choice))
    rates, experts, targets, extra = steps
    order = np.argsort(-rates, kind="stable")  # stable: an expert's steps stay in their order
    experts, targets, extra = experts[order], targets[order], extra[order]
    fits = int(np.searchsorted(np.cumsum(extra), slack, side="right"))
    price = float(rates[order[fits]]) if fits < len(order) else 0.0
    choice[experts[:fits]] = targets[:fits]  # of an expert's several steps the last one counts
    slack -= int(extra[:fits].sum())
    closed = set()  # an expert whose step did not fit stays, its later steps would skip one
    for expert, target, more in zip(
        experts[fits:].tolist(), targets[fits:].tolist(), extra[fits:].tolist(), strict=True
    ):
        if more > slack:
            closed.add(expert)
        elif expert not in closed:
            choice[expert] = target
            slack -= more
    return choice, price


def _hull_steps(costs: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Walk every expert's lower convex hull from its smallest width.

    Returns:
        The smallest widths [N], and the steps' (cost saved a byte, expert, target width, bytes more), expert by step.
    """
    rows = np.arange(len(costs))
    smallest = np.where(sizes == sizes.min(axis=1, keepdims=True), costs, np.inf).argmin(axis=1)
    at, found = smallest.copy(), []
    for _ in range(costs.shape[1] - 1):
        saved, more = costs[rows, at][:, None] - costs, sizes - sizes[rows, at][:, None]
        rate = np.where((more > 0) & (saved > 0), saved / np.maximum(more, 1), 0.0)
        best = rate.max(axis=1)
        target = np.where(rate == best[:, None], more, -1).argmax(axis=1)  # the farthest of equal rates
        moved = np.flatnonzero(best > 0)
        if not len(moved):
            break
        found.append((best[moved], moved, target[moved], more[moved, target[moved]]))
        at[moved] = target[moved]
    if not found:
        return smallest, (np.empty(0), *(np.empty(0, np.int64) for _ in range(3)))
    return smallest, tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def _dominated(costs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[N, B], whether another width costs no more and takes no more (of equals the first stays)."""
    out = np.zeros(costs.shape, bool)
    for j in range(costs.shape[1]):
        for other in range(costs.shape[1]):
            worse = (costs[:, other] <= costs[:, j]) & (sizes[:, other] <= sizes[:, j])
            equal = (costs[:, other] == costs[:, j]) & (sizes[:, other] == sizes[:, j])
            out[:, j] |= worse & (~equal | (other < j))
    return out


def _reduced(costs: np.ndarray, sizes: np.ndarray, price: float) -> np.ndarray:
    priced = costs + price * sizes
    return priced - priced.min(axis=1, keepdims=True)


def _total(values: np.ndarray, choice: np.ndarray) -> np.number:
    return values[np.arange(len(choice)), choice].sum()


def _solve(
    costs: np.ndarray,
    sizes: np.ndarray,
    budget: int,
    open_widths: np.ndarray,
    start: np.ndarray,
    gap: float,
    time_limit_s: float,
    solver: str,
) -> tuple[np.ndarray, str] | None:
    """Hand the experts with more than one open width to a solver.

    Returns:
        [N], the choice, and the name of the solver; None where no width is open or nothing was found in time.
    """
    import pulp

    from moeflow.integer_program import found_solution, pulp_solver, solver_name

    rows = np.flatnonzero(open_widths.sum(axis=1) > 1)
    if not len(rows):
        return None
    choice = np.where(open_widths.sum(axis=1) > 1, start, open_widths.argmax(axis=1))
    fixed = np.setdiff1d(np.arange(len(costs)), rows)
    room = budget - int(sizes[fixed, choice[fixed]].sum())
    constant = float(costs[fixed, choice[fixed]].sum())
    scale = max(float(costs[rows][open_widths[rows]].max()), 1e-300)  # solvers' tolerances are absolute
    unit = int(np.gcd.reduce(sizes[rows][open_widths[rows]])) or 1
    program = pulp.LpProblem("widths", pulp.LpMinimize)
    variables = {
        (row, j): pulp.LpVariable(f"x_{row}_{j}", cat=pulp.LpBinary)
        for row in rows.tolist()
        for j in np.flatnonzero(open_widths[row]).tolist()
    }
    program.setObjective(pulp.LpAffineExpression({x: float(costs[key]) / scale for key, x in variables.items()}))
    program.addConstraint(
        pulp.LpAffineExpression({x: int(sizes[key]) // unit for key, x in variables.items()}) <= room // unit
    )
    widths_of: dict[int, dict[pulp.LpVariable, int]] = {}
    for (row, j), x in variables.items():
        x.setInitialValue(int(start[row] == j))
        widths_of.setdefault(row, {})[x] = 1
    for widths in widths_of.values():
        program.addConstraint(pulp.LpAffineExpression(widths) == 1)
    # The gap is asked of the whole: what is fixed adds to cost and bound alike.
    open_cost = max(_total(costs, start) - constant, 1e-300)
    open_gap = gap * (constant + open_cost) / open_cost
    try:
        chosen = pulp_solver(solver, time_limit_s=time_limit_s, gap=open_gap, warm_start=True)
    except PlacementError as error:
        logger.warning("the relaxation, rounded, stands as it is: %s", error)
        return None
    program.solve(chosen)
    if not found_solution(program):
        return None
    for (row, j), x in variables.items():
        if (x.value() or 0) > 0.5:
            choice[row] = j
    return (choice, solver_name(chosen)) if _total(sizes, choice) <= budget else None
