"""Lower bound on a step's seconds from balance: compute, and for dispatch the links, spread evenly by a linear program.

An expert with r replicas has the fraction 1 / r on each of its GPUs. A GPU takes at least c(n) / r for n / r tokens,
since c(n) / n falls with n; the tokens that a GPU serves are linear in its fractions. So every plan is a point of this
linear program, one for each layer, and costs at least its optimum:

    minimise sum_k p_k T_k   with   sum_e c_k[e, g] x[e, g] <= T_k,   sum_g x[e, g] = 1,   sum_e x[e, g] <= slots[g],
                                    T_k >= the least time of the most loaded expert alone

k runs over each workload's compute and, with dispatch, its slowest link there and back. Equal GPUs share one column.
The bound is the dual's value at the solver's multipliers, made feasible first, so it holds to rounding of the last
digit whatever the solver's tolerance. Communication by path may be 0 and counts as 0.
"""

import time

import numpy as np

from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem, Solution


def balance_bound(problem: Problem) -> float:
    """Return a lower bound in seconds on `Problem.objective` of every plan within the slots."""
    count = len(problem.workloads)
    mean = np.full(count, 1 / count)
    if not problem.worst_case or count == 1:
        return _bound(problem, mean)
    # The worst is at least any weighted mean of the workloads.
    return max(_bound(problem, weights) for weights in (mean, *np.eye(count)))


def with_balance_bound(problem: Problem, solver: str, plan: Plan, begin: float, status: str = "feasible") -> Solution:
    """Return the solution of a solver that proves no bound itself.

    Args:
        problem: the problem it solves.
        solver: its name.
        plan: the placement; is checked.
        begin: `time.perf_counter()` when the solver began.
        status: "feasible" or "time limit"; becomes "optimal" where the bound is reached.
    """
    problem.check(plan)
    objective, bound = problem.objective(plan), balance_bound(problem)
    if objective <= bound * (1 + 1e-9):
        status = "optimal"
    return Solution(solver, plan, objective, min(bound, objective), "balance", time.perf_counter() - begin, status)


def _bound(problem, weights) -> float:
    """Return the bound on the workloads' mean with weights [W]."""
    used = np.flatnonzero(weights)
    each = [_resources(problem, problem.workloads[w]) for w in used]
    costs = np.concatenate([costs for costs, _ in each])  # [R, L, E, G]
    least = np.concatenate([least for _, least in each])  # [R, L]
    prices = np.repeat(weights[used], [len(costs) for costs, _ in each])  # [R]
    kinds, first, members = _kinds(problem, costs)
    costs = costs[..., first]
    if len(kinds) == 1:
        spread = costs.sum(axis=(2, 3)) / problem.num_gpus
        return float((np.maximum(spread, least) * prices[:, None]).sum())
    slots = np.array([problem.slots[group].sum() for group in kinds])
    return sum(_layer(costs[:, layer], least[:, layer], prices, members, slots) for layer in range(problem.num_layers))


def _resources(problem, workload) -> tuple[np.ndarray, np.ndarray]:
    """List each expert's seconds on a layer's GPUs and, with dispatch, on its links.

    Returns:
        [R, L, E, G] seconds of the whole expert on a GPU, and [R, L], the least seconds of the most loaded expert.
    """
    step, topology = problem.step, problem.topology
    tokens = workload.shares() * step.assignments
    rates = []
    if step.communication == "dispatch":
        # A GPU gets a G-th of its tokens from each GPU; its slowest link counts, there and back.
        bandwidth = topology.bandwidth_bytes_per_s
        rates = [step.token_bytes / problem.num_gpus / bandwidth.min(axis=axis) for axis in (0, 1)]
    most = int(min(problem.num_gpus, problem.slots.sum() - problem.num_experts + 1))  # replicas of one expert

    def seconds(tokens: np.ndarray) -> np.ndarray:
        return np.stack([step.expert_seconds(tokens, topology), *(tokens[..., None] * rate for rate in rates)])

    alone = [np.sort(seconds(tokens.max(axis=1) / r), axis=-1)[..., r - 1] for r in range(1, most + 1)]
    return seconds(tokens), np.min(alone, axis=0)


def _kinds(problem, costs) -> tuple[list[list[int]], list[int], np.ndarray]:
    """Group GPUs of equal costs and slots: [K] lists of GPUs, the first of each, and their numbers [K]."""
    marks = np.column_stack([costs.reshape(-1, problem.num_gpus).T, problem.slots])
    groups: dict[bytes, list[int]] = {}
    for gpu, mark in enumerate(marks):
        groups.setdefault(mark.tobytes(), []).append(gpu)
    kinds = list(groups.values())
    return kinds, [group[0] for group in kinds], np.array([len(group) for group in kinds])


def _layer(costs, least, prices, members, slots) -> float:
    multipliers, rents = _multipliers(costs, least, prices, members, slots)
    return max(layer_bound(costs, least, prices, members, slots, multipliers, rents), float(prices @ least))


def layer_bound(
    costs: np.ndarray,
    least: np.ndarray,
    prices: np.ndarray,
    members: np.ndarray,
    slots: np.ndarray,
    multipliers: np.ndarray,
    rents: np.ndarray,
) -> float:
    """Return the dual of one layer's program, at most its optimum for any multipliers and rents.

    Args:
        costs: [R, E, K], each expert's cost of each resource on a GPU of each kind.
        least: [R], the least cost of the slowest GPU.
        prices: [R], price of a resource's slowest GPU.
        members: [K], GPUs of each kind.
        slots: [K], sum over the GPUs of a kind.
        multipliers: [R, K], 0 or more.
        rents: [K], price of a slot, 0 or more.
    """
    paid = multipliers @ members  # of each resource at most its price; the rest is paid for the most loaded expert
    multipliers = multipliers * np.minimum(1, prices / np.maximum(paid, 1e-300))[:, None]
    rest = np.maximum(prices - multipliers @ members, 0)
    chosen = (np.einsum("rk,rek->ek", multipliers, costs) + rents).min(axis=1)
    return float(chosen.sum() - rents @ slots + rest @ least)


def _multipliers(costs, least, prices, members, slots) -> tuple[np.ndarray, np.ndarray]:
    """Solve the program; return its multipliers [R, K] of the resources and [K] of the slots, none negative."""
    import pulp

    from moeflow.integer_program import pulp_solver

    resources, experts, kinds = costs.shape
    scale = costs.sum(axis=1).max(axis=1) / members.sum()  # [R], solvers' tolerances are absolute
    scale = np.where(scale > 0, scale, 1.0)
    program = pulp.LpProblem("balance", pulp.LpMinimize)
    x = [[pulp.LpVariable(f"x_{e}_{k}", 0) for k in range(kinds)] for e in range(experts)]
    slowest = [pulp.LpVariable(f"t_{r}", float(least[r] / scale[r])) for r in range(resources)]
    value = float(prices @ scale)
    program.setObjective(
        pulp.LpAffineExpression({slowest[r]: float(prices[r] * scale[r] / value) for r in range(resources)})
    )
    for e in range(experts):
        program.addConstraint(pulp.LpAffineExpression(dict.fromkeys(x[e], 1)) == 1)
    rows, rooms = {}, []
    for k in range(kinds):
        rooms.append(pulp.LpAffineExpression({x[e][k]: 1 for e in range(experts)}) <= int(slots[k]))
        program.addConstraint(rooms[-1])
        for r in range(resources):
            taken = {x[e][k]: float(costs[r, e, k] / scale[r]) for e in range(experts)}
            rows[r, k] = pulp.LpAffineExpression({**taken, slowest[r]: -int(members[k])}) <= 0
            program.addConstraint(rows[r, k])
    program.solve(pulp_solver())
    multipliers = np.array(
        [[-(rows[r, k].pi or 0.0) * value / scale[r] for k in range(kinds)] for r in range(resources)]
    )
    rents = np.array([-(room.pi or 0.0) * value for room in rooms])
    return np.maximum(multipliers, 0), np.maximum(rents, 0)
