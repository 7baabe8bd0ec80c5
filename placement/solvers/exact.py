"""A small placement problem as one integer program, replicas and slowest links included.

y[l, e, s] in {0, 1} says that expert e of layer l has its copies on the set s of GPUs; z[l, e, s, f, t] is the product
of y[l, e, s] and y[l + 1, f, t] for two experts that a transition joins:

    minimise sum_l (compute_l + link_l), the mean over the workloads or the worst
    with   sum_s y[l, e, s] = 1,   copies of a layer <= experts + replicas,   copies on a GPU <= its slots,
           sum_t z[l, e, s, f, t] = y[l, e, s],   sum_s z[l, e, s, f, t] = y[l + 1, f, t],
           compute_l >= each GPU's seconds,   link_l >= each link's seconds

Every product of two choices is exact at whole y; sums over sets make z as tight as a linear program can.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moeflow.placement.plan import Plan
from moeflow.placement.problem import Problem

if TYPE_CHECKING:
    import pulp

_MAX_PRODUCTS = 6000  # variables z of a small program
_MAX_GPUS = 4


class Exact(NamedTuple):
    """The program's result.

    Args:
        plan: the best it found; the start where it found none.
        bound: the solver's lower bound on every plan; -inf where it proved none.
    """

    plan: Plan
    bound: float


def is_small(problem: Problem) -> bool:
    """Return whether the whole program can be solved in moments."""
    if problem.num_gpus > _MAX_GPUS:
        return False
    per_layer = (problem.num_experts * len(_sets(problem))) ** 2
    by_path = problem.step.communication == "path"
    return per_layer * (problem.num_layers - 1 if by_path else 0) <= _MAX_PRODUCTS and (
        problem.num_layers * problem.num_experts * len(_sets(problem)) <= _MAX_PRODUCTS // 10
    )


def exact(problem: Problem, *, start: Plan, time_limit_s: float = 60.0, seed: int = 0) -> Exact:
    """Solve the whole program.

    Args:
        problem: small, see `is_small`.
        start: a plan within the slots, whose objective the program need not exceed.
        time_limit_s: after which the best so far counts.
        seed: of the solver.
    """
    from moeflow.integer_program import found_solution, proven_bound, pulp_solver

    scale = problem.objective(start)  # solvers' tolerances are absolute
    model = _Model(problem, scale)
    model.program += model.total() <= 1 + 1e-6
    model.program.solve(pulp_solver(time_limit_s=time_limit_s, seed=seed))
    plan = start
    if found_solution(model.program):
        chosen = {key[:2]: key[2] for key, variable in model.choice.items() if (variable.value() or 0) > 0.5}
        layers, experts = range(problem.num_layers), range(problem.num_experts)
        plan = Plan(problem.num_gpus, tuple(tuple(chosen[layer, expert] for expert in experts) for layer in layers))
    return Exact(plan, scale * proven_bound(model.program))


def _sets(problem) -> list[tuple[int, ...]]:
    """Return the sets of GPUs that may hold an expert."""
    most = min(problem.num_gpus, problem.num_replicas + 1)
    gpus = range(problem.num_gpus)
    return [group for size in range(1, most + 1) for group in itertools.combinations(gpus, size)]


class _Model:
    """The program and its variables; times in units of `scale` seconds."""

    def __init__(self, problem: Problem, scale: float):
        import pulp

        self.problem, self.scale, self.pulp = problem, scale, pulp
        self.program = pulp.LpProblem("placement", pulp.LpMinimize)
        self.sets = _sets(problem)
        self.choice = {
            (layer, expert, group): pulp.LpVariable(f"y_{layer}_{expert}_{number}", cat=pulp.LpBinary)
            for layer in range(problem.num_layers)
            for expert in range(problem.num_experts)
            for number, group in enumerate(self.sets)
        }
        # The parts that sum to each workload's step.
        self.seconds: list[list[pulp.LpVariable]] = [[] for _ in problem.workloads]
        self._place()
        for number, workload in enumerate(problem.workloads):
            self._compute(number, workload)
        if problem.step.communication == "path":
            self._paths()
        self.program.setObjective(self.total())

    def total(self) -> pulp.LpAffineExpression:
        """The objective as an expression."""
        if not hasattr(self, "_total"):
            sums = [self.pulp.lpSum(parts) for parts in self.seconds]
            if self.problem.worst_case:
                self._total = self.pulp.LpVariable("worst", 0)
                for each in sums:
                    self.program += each <= self._total
                self._total = self._total + 0
            else:
                self._total = self.pulp.lpSum(sums) * (1 / len(sums))
        return self._total

    def _place(self) -> None:
        problem, lp_sum = self.problem, self.pulp.lpSum
        for layer in range(problem.num_layers):
            for expert in range(problem.num_experts):
                self.program += lp_sum(self.choice[layer, expert, group] for group in self.sets) == 1
            every = [
                (self.choice[layer, expert, group], group)
                for expert in range(problem.num_experts)
                for group in self.sets
            ]
            most = problem.num_experts + problem.num_replicas
            self.program += lp_sum(len(group) * y for y, group in every) <= most
            for gpu in range(problem.num_gpus):
                self.program += lp_sum(y for y, group in every if gpu in group) <= int(problem.slots[gpu])

    def _compute(self, number, workload) -> None:
        problem, step = self.problem, self.problem.step
        tokens = workload.shares() * step.assignments
        sizes = range(1, len(self.sets[-1]) + 1)
        seconds = {size: step.expert_seconds(tokens / size, problem.topology) / self.scale for size in sizes}
        link = np.zeros((2, problem.num_gpus))
        if step.communication == "dispatch" and problem.num_gpus > 1:
            bandwidth = problem.topology.bandwidth_bytes_per_s
            link = step.token_bytes / problem.num_gpus / self.scale / np.stack([bandwidth.min(0), bandwidth.min(1)])
        for layer in range(problem.num_layers):
            self._slowest(number, f"c_{number}_{layer}", layer, lambda e, g, n, at=layer: seconds[n][at, e, g])
            for way, rates in enumerate(link):
                if rates.any():
                    self._slowest(
                        number,
                        f"d{way}_{number}_{layer}",
                        layer,
                        lambda e, g, n, at=layer, rates=rates: tokens[at, e] / n * rates[g],
                    )

    def _slowest(self, number, name, layer, cost) -> None:
        """Add a time that bounds every GPU's sum of cost(expert, GPU, copies) in a layer."""
        slowest = self.pulp.LpVariable(name, 0)
        self.seconds[number].append(slowest)
        for gpu in range(self.problem.num_gpus):
            taken = [
                float(cost(expert, gpu, len(group))) * self.choice[layer, expert, group]
                for expert in range(self.problem.num_experts)
                for group in self.sets
                if gpu in group
            ]
            self.program += self.pulp.lpSum(taken) <= slowest

    def _paths(self) -> None:
        problem, gpus = self.problem, range(self.problem.num_gpus)
        per_byte = problem.step.assignments * problem.step.token_bytes / self.scale
        seconds = per_byte / problem.topology.bandwidth_bytes_per_s
        for layer in range(problem.num_layers - 1):
            counts = np.stack([workload.known_transitions()[layer] for workload in problem.workloads])
            shares = counts / np.maximum(counts.sum(axis=(1, 2), keepdims=True), 1e-300)
            both = self._products(layer, shares.sum(axis=0))
            for number in range(len(problem.workloads)):
                slowest = self.pulp.LpVariable(f"l_{number}_{layer}", 0)
                self.seconds[number].append(slowest)
                for source, target in itertools.permutations(gpus, 2):
                    taken = [
                        float(shares[number, e, f] * seconds[source, target] / len(s) / len(t)) * z
                        for (e, s, f, t), z in both.items()
                        if source in s and target in t
                    ]
                    self.program += self.pulp.lpSum(taken) <= slowest

    def _products(self, layer, used) -> dict[tuple, pulp.LpVariable]:
        """Return z for every pair of experts that a transition joins."""
        lp_sum = self.pulp.lpSum
        both: dict[tuple, pulp.LpVariable] = {}
        for e, f in np.argwhere(used > 0).tolist():
            for (i, s), (j, t) in itertools.product(enumerate(self.sets), repeat=2):
                both[e, s, f, t] = self.pulp.LpVariable(f"z_{layer}_{e}_{i}_{f}_{j}", 0)
            for s in self.sets:
                self.program += lp_sum(both[e, s, f, t] for t in self.sets) == self.choice[layer, e, s]
            for t in self.sets:
                self.program += lp_sum(both[e, s, f, t] for s in self.sets) == self.choice[layer + 1, f, t]
        return both
