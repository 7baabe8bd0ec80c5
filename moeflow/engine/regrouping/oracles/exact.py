"""Regrouping by an integer program: the oracle of small cases.

minimise sum over groups and pairs of y[g, p]   with   y[g, p] >= x[t, g] for every token t that takes pair p,
                                                       sum_g x[t, g] = 1,   sum_t x[t, g] = size of g,   x in {0, 1}
"""

import numpy as np

from moeflow.engine.regrouping.search import arrival_groups
from moeflow.integer_program import found_solution, pulp_solver


def exact_groups(
    routes: np.ndarray, num_groups: int, *, time_limit_s: float = 60.0, seed: int = 0
) -> tuple[np.ndarray, bool]:
    """Split a few tokens into groups with the fewest active pairs.

    Args:
        routes: [tokens, L, E] bool.
        num_groups: sizes differ by one at most, as in `search.arrival_groups`.
        time_limit_s: after which the best so far counts.
        seed: of the solver.

    Returns:
        [tokens] int32 groups, and whether they are proven to be the best.
    """
    import pulp

    tokens, start = len(routes), arrival_groups(len(routes), num_groups)
    taken = routes.reshape(tokens, -1)
    # Pairs with the same tokens are one variable that counts several times.
    columns, counts = np.unique(taken[:, taken.any(axis=0)], axis=1, return_counts=True)
    program = pulp.LpProblem("groups", pulp.LpMinimize)
    groups = range(num_groups)
    x = [[pulp.LpVariable(f"x_{t}_{g}", cat=pulp.LpBinary) for g in groups] for t in range(tokens)]
    y = [[pulp.LpVariable(f"y_{p}_{g}", 0, 1) for g in groups] for p in range(len(counts))]
    program.setObjective(pulp.LpAffineExpression({y[p][g]: int(counts[p]) for p in range(len(counts)) for g in groups}))
    for t in range(tokens):
        program += pulp.lpSum(x[t]) == 1
    for g in groups:
        program += pulp.lpSum(x[t][g] for t in range(tokens)) == int((start == g).sum())
    for p, column in enumerate(columns.T):
        for g in groups:
            for t in np.flatnonzero(column).tolist():
                program += y[p][g] >= x[t][g]
    program.solve(pulp_solver(time_limit_s=time_limit_s, seed=seed))
    if not found_solution(program):
        return start, False
    chosen = np.array([[(variable.value() or 0) for variable in row] for row in x]).argmax(axis=1)
    return chosen.astype(np.int32), program.status == pulp.LpStatusOptimal and program.sol_status == 1
