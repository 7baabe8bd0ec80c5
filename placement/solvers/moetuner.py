"""MoETuner's two programs: the clusters of experts first, then the GPU of each cluster.

The first, for each layer, with x[e, g] in {0, 1}:

    minimise the slowest cluster's compute   with   sum_g x[e, g] = replicas of e,   sum_e x[e, g] <= slots[g]

so an expert is in exactly as many clusters as it has replicas, never twice in one, and a cluster never outgrows its
GPU. Replicas are chosen as EPLB does. A layer starts from the heaviest-first packing. A small program redistributes the
experts of the slowest and the fastest cluster until that no longer helps, nor with the next fastest. The whole program
starts from there, unless it is too large. The second is `moeflow.placement.solvers.cluster_mapping`. The first knows
nothing of links: that is the scheme, not an omission.

Source: MoETuner (arXiv 2502.06643, section 4).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from moeflow.placement.bounds.balance import with_balance_bound
from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem, Solution
from moeflow.placement.solvers.baselines import Progress, mean_tokens, pack, replica_seconds
from moeflow.placement.solvers.cluster_mapping import map_clusters
from moeflow.placement.solvers.eplb import replicate

if TYPE_CHECKING:
    import pulp

_MAX_GAP = 1e-3  # of a layer's slowest cluster, at which its program may stop
_MAX_CHOICES = 512  # variables x of a layer's whole program
_MAX_PARTNERS = 8  # that the slowest cluster of a layer tries
_CLUSTERS_SHARE = 0.8  # of the time; the rest is the mapping's


def moetuner(
    problem: Problem, *, seed: int = 0, time_limit_s: float = 60.0, progress: Progress | None = None
) -> Solution:
    """Balance each layer's clusters, then map them to GPUs by the path of tokens."""
    begin = time.perf_counter()
    copies = replicate(mean_tokens(problem), problem.num_replicas, problem.num_gpus)
    held = pack(replica_seconds(problem, copies), copies, problem.slots)
    done = _balance(problem, held, seed, begin + _CLUSTERS_SHARE * time_limit_s, progress)
    shares = held / held.sum(axis=2, keepdims=True)
    order, mapped = map_clusters(problem, shares, begin + time_limit_s)
    placed = np.zeros_like(held)
    np.put_along_axis(placed, np.broadcast_to(order[:, None], held.shape), held, axis=2)
    status = "feasible" if done and mapped else "time limit"
    return with_balance_bound(problem, "moetuner", Plan.of_mask(placed), begin, status)


def _balance(problem, held, seed, deadline, progress) -> bool:
    """Improve the clusters held [L, E, G] in place; return whether every layer's programs ended in time."""
    shares = np.stack([workload.shares() for workload in problem.workloads])
    tokens = shares * problem.step.assignments / held.sum(axis=2)
    seconds = problem.step.expert_seconds(tokens, problem.topology)  # [W, L, E, G]
    ended = True
    for layer, clusters in enumerate(held):
        now = time.perf_counter()
        until = now + (deadline - now) / (problem.num_layers - layer)
        if until <= now:
            return False
        ended &= _balance_layer(problem, seconds[:, layer], clusters, seed, until)
        if progress is not None:
            progress((layer + 1) / problem.num_layers, f"layer {layer}")
    return ended


def _balance_layer(problem, seconds, clusters, seed, until) -> bool:
    """Improve clusters [E, G] in place by seconds [W, E, G]; return whether that ended before `until`."""
    alike = len({(gpu.flops_per_s, gpu.memory_bytes_per_s) for gpu in problem.topology.gpus}) == 1
    improved = True
    while improved:
        busy = (seconds * clusters).sum(axis=1)  # [W, G]
        if alike and _slowest(problem, busy) <= _slowest(problem, busy.mean(axis=1, keepdims=True)) * (1 + _MAX_GAP):
            return True
        improved = False
        order = np.argsort((busy / busy.max(axis=1, keepdims=True)).max(axis=0), kind="stable")
        for partner in order[:-1][:_MAX_PARTNERS]:
            if time.perf_counter() > until:
                return False
            if _improve(problem, seconds, clusters, np.sort([partner, order[-1]]), seed, until):
                improved = True
                break
    if clusters.size > _MAX_CHOICES:
        return True
    return _solve(problem, seconds, clusters, np.arange(problem.num_gpus), seed, until)


def _improve(problem, seconds, clusters, pair, seed, until) -> bool:
    """Redistribute the experts of two clusters where that helps them and does not harm the whole; return whether."""
    before, busy = clusters.copy(), (seconds * clusters).sum(axis=1)
    _solve(problem, seconds, clusters, pair, seed, until)
    after = (seconds * clusters).sum(axis=1)
    # With several workloads a pair may gain in one while the whole loses in another.
    if _slowest(problem, after) <= _slowest(problem, busy) and _slowest(problem, after[:, pair]) < _slowest(
        problem, busy[:, pair]
    ) * (1 - _MAX_GAP / 10):
        return True
    clusters[:] = before
    return False


def _slowest(problem, busy) -> float:
    """Return the slowest cluster's seconds of busy [W, G], by the mean of the workloads or the worst."""
    return float(busy.max() if problem.worst_case else busy.max(axis=1).mean())


def _solve(problem, seconds, clusters, gpus, seed, until) -> bool:
    """Redistribute the experts of some GPUs' clusters in place; return whether the program ended by itself."""
    import pulp

    from moeflow.integer_program import found_solution, pulp_solver

    experts = np.flatnonzero(clusters[:, gpus].any(axis=1))
    part, start = np.ix_(experts, gpus), clusters[np.ix_(experts, gpus)]
    slots = problem.slots[gpus]
    program, x = _program(seconds[:, experts][..., gpus], start, slots, problem.worst_case)
    program.solve(pulp_solver(time_limit_s=until - time.perf_counter(), gap=_MAX_GAP, seed=seed, warm_start=True))
    if found_solution(program):
        found = np.array([[(variable.value() or 0) > 0.5 for variable in row] for row in x])
        if (found.sum(axis=1) == start.sum(axis=1)).all() and (found.sum(axis=0) <= slots).all():
            clusters[part] = found
    return program.sol_status == pulp.LpSolutionOptimal


def _program(seconds, start, slots, worst_case) -> tuple[pulp.LpProblem, list[list[pulp.LpVariable]]]:
    """Build one program.

    Args:
        seconds: [W, E, G], of each expert's replica.
        start: [E, G] bool, the first clusters.
        slots: [G].
        worst_case: whether the worst workload counts.

    Returns:
        The program and its x [E][G], all variables with initial values.
    """
    import pulp

    num_workloads, num_experts, num_gpus = seconds.shape
    taken = (seconds * start).sum(axis=1).max(axis=1)  # [W]
    unit = float(taken.max()) or 1.0  # solvers' tolerances are absolute
    program = pulp.LpProblem("clusters", pulp.LpMinimize)
    x = [[pulp.LpVariable(f"x_{e}_{g}", cat=pulp.LpBinary) for g in range(num_gpus)] for e in range(num_experts)]
    taken = taken.max(keepdims=True) if worst_case else taken
    slowest = [pulp.LpVariable(f"t_{w}", 0) for w in range(len(taken))]
    program.setObjective(pulp.LpAffineExpression(dict.fromkeys(slowest, 1 / len(slowest))))
    for w, variable in enumerate(slowest):
        variable.setInitialValue(float(taken[w] / unit))
    for e in range(num_experts):
        program.addConstraint(pulp.LpAffineExpression(dict.fromkeys(x[e], 1)) == int(start[e].sum()))
        for g in range(num_gpus):
            x[e][g].setInitialValue(int(start[e, g]))
    for g in range(num_gpus):
        program.addConstraint(pulp.LpAffineExpression({x[e][g]: 1 for e in range(num_experts)}) <= int(slots[g]))
        for w in range(num_workloads):
            work = {x[e][g]: float(seconds[w, e, g] / unit) for e in range(num_experts)}
            program.addConstraint(pulp.LpAffineExpression({**work, slowest[0 if worst_case else w]: -1}) <= 0)
    return program, x
