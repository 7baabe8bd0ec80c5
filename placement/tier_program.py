"""The 0-1 program that puts each expert on one of three tiers, the first two of them limited, and its bound.

Any prices p >= 0 of a byte on the GPU and in host memory prove a bound: sum over experts of min_tier (cost + p size),
less p budget. The linear relaxation's multipliers are the best of them.

Knows numbers. Knows nothing of models or rates.
"""

import math
import time

import numpy as np
import pulp

from moeflow.integer_program import found_solution, proven_bound, pulp_solver

_TARGET_GAP = 1e-4  # at which the search stops


def fill_in_order(sizes: np.ndarray, budgets: tuple[float, float], order: np.ndarray) -> np.ndarray:
    """Return [N], the first tier that has room for each expert, experts taken in `order`."""
    room, tier = list(budgets), np.full(len(sizes), 2)
    for expert in order:
        for number in range(2):
            if sizes[expert] <= room[number]:
                tier[expert] = number
                room[number] -= sizes[expert]
                break
    return tier


def improve_tiers(
    sizes: np.ndarray,
    costs: np.ndarray,
    budgets: tuple[float, float],
    start: np.ndarray,
    *,
    seed: int = 0,
    time_limit_s: float = 60.0,
    solver: str = "auto",
) -> tuple[np.ndarray, float, bool]:
    """Find the tiers that cost least.

    Args:
        sizes: [N] bytes, above 0.
        costs: [N, 3], infinite in the last column where there is no third tier.
        budgets: bytes of the first two tiers; the third has no limit.
        start: [N] tiers; may use a third tier that does not exist.
        seed: of the solver.
        time_limit_s: of relaxation and program together.
        solver: see `moeflow.integer_program`.

    Returns:
        [N] tiers, the start's or better; a bound; and whether the search ended before the time limit.
    """
    until = time.perf_counter() + time_limit_s
    cost = total(costs, start)
    program, _, rooms = _program(sizes, costs, budgets, start, pulp.LpContinuous)
    program.solve(pulp_solver(solver, time_limit_s=time_limit_s, seed=seed))
    unit = _unit(costs)
    bound = dual_bound(sizes, costs, budgets, [unit * max(-(room.pi or 0.0), 0) if room else 0.0 for room in rooms])
    if cost <= bound * (1 + _TARGET_GAP):
        return start, bound, True
    program, x, _ = _program(sizes, costs, budgets, start, pulp.LpBinary)
    left_s = until - time.perf_counter()
    program.solve(pulp_solver(solver, time_limit_s=left_s, gap=_TARGET_GAP, seed=seed, warm_start=math.isfinite(cost)))
    tier = start
    if found_solution(program):
        bound = max(bound, proven_bound(program) * unit)
        found = np.array([max(row, key=lambda number: row[number].value() or 0) for row in x])
        fits = all(sizes[found == number].sum() <= budgets[number] for number in range(2))
        if fits and total(costs, found) < cost:
            tier = found
    return tier, bound, program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionInfeasible)


def dual_bound(sizes: np.ndarray, costs: np.ndarray, budgets: tuple[float, float], prices: list[float]) -> float:
    """Return a lower bound on every choice within the budgets, for any prices (>= 0) of a byte on two tiers."""
    paid = costs + np.stack([sizes * prices[0], sizes * prices[1], np.zeros(len(sizes))], axis=1)
    rent = sum(price * budget for price, budget in zip(prices, budgets, strict=True) if price)
    return max(float(paid.min(axis=1).sum() - rent), 0.0)


def total(costs: np.ndarray, tier: np.ndarray) -> float:
    """Return the sum of the chosen costs; infinite where one is on a tier that does not exist."""
    return float(costs[np.arange(len(tier)), tier].sum())


def _unit(costs: np.ndarray) -> float:
    """Return the unit of the costs a solver gets, since solvers' tolerances are absolute."""
    return float(costs[:, 1].sum()) or 1.0


def _program(
    sizes: np.ndarray, costs: np.ndarray, budgets: tuple[float, float], start: np.ndarray, kind: str
) -> tuple[pulp.LpProblem, list[dict[int, pulp.LpVariable]], list[pulp.LpConstraint | None]]:
    """Return the program, x as [N] dicts by tier, and the budgets' constraints, None where there is no limit."""
    unit = _unit(costs)
    largest = float(sizes.max())
    program = pulp.LpProblem("tiers", pulp.LpMinimize)
    x = [
        {number: pulp.LpVariable(f"x_{n}_{number}", 0, 1, kind) for number in range(3) if math.isfinite(row[number])}
        for n, row in enumerate(costs)
    ]
    program.setObjective(
        pulp.LpAffineExpression(
            {v: float(costs[n, number] / unit) for n, row in enumerate(x) for number, v in row.items()}
        )
    )
    for n, row in enumerate(x):
        program.addConstraint(pulp.LpAffineExpression(dict.fromkeys(row.values(), 1)) == 1)
        for number, variable in row.items():
            variable.setInitialValue(int(start[n] == number))
    rooms = []
    for number, budget in enumerate(budgets):
        taken = pulp.LpAffineExpression({row[number]: float(sizes[n] / largest) for n, row in enumerate(x)})
        rooms.append(taken <= budget / largest if math.isfinite(budget) else None)
        if rooms[-1] is not None:
            program.addConstraint(rooms[-1])
    return program, x, rooms
