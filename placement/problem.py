"""A placement problem and its solution: a plan, its cost, and its largest possible distance from the optimum."""

from dataclasses import dataclass

import numpy as np

from moeflow.errors import PlacementError
from moeflow.placement.cost import PlacementCost, StepShape, judge
from moeflow.placement.plan import Plan
from moeflow.placement.topology import Topology
from moeflow.placement.workload import Workload


@dataclass(frozen=True)
class Problem:
    """Place L x E experts on G GPUs.

    Args:
        workloads: one or more, of one model.
        topology: the machine.
        step: the size of a step.
        num_replicas: slots a layer beyond one for each expert, all GPUs together.
        worst_case: whether the slowest workload's step time counts, not the mean of all.

    Raises:
        PlacementError: workloads of different models; more GPUs than slots; fewer slots than experts.
    """

    workloads: tuple[Workload, ...]
    topology: Topology
    step: StepShape
    num_replicas: int = 0
    worst_case: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "workloads", tuple(self.workloads))
        if not self.workloads:
            raise PlacementError("no workload: give counts or a trace to place experts by.")
        first = self.workloads[0]
        for other in self.workloads[1:]:
            if other.shape != first.shape:
                raise PlacementError(
                    f"{other.name} has {other.num_layers} layers of {other.num_experts} experts, {first.name} has "
                    f"{first.num_layers} of {first.num_experts}. Give counts of one model."
                )
        if self.step.communication == "path" and any(workload.transitions is None for workload in self.workloads):
            missing = next(workload.name for workload in self.workloads if workload.transitions is None)
            raise PlacementError(
                f"{missing} counts no transitions between layers, so nothing is known of the path of its tokens. "
                "Give a trace, or ask for communication by dispatch."
            )
        if self.num_replicas < 0:
            raise PlacementError(f"{self.num_replicas} replicas were asked for. Give 0 or more.")
        if self.num_gpus > self.num_experts + self.num_replicas:
            raise PlacementError(
                f"{self.num_gpus} GPUs for {self.num_experts} experts a layer and {self.num_replicas} replicas: some "
                f"GPUs would hold nothing. Use at most {self.num_experts + self.num_replicas} GPUs, or more replicas."
            )
        if self.num_replicas > self.num_experts * (self.num_gpus - 1):
            raise PlacementError(
                f"{self.num_replicas} replicas a layer, and {self.num_experts} experts on {self.num_gpus} GPUs have "
                f"room for {self.num_experts * (self.num_gpus - 1)}: then every GPU holds every expert."
            )
        self._check_memory()

    @property
    def num_gpus(self) -> int:
        return self.topology.num_gpus

    @property
    def num_layers(self) -> int:
        return self.workloads[0].num_layers

    @property
    def num_experts(self) -> int:
        return self.workloads[0].num_experts

    @property
    def slots(self) -> np.ndarray:
        """[G], how many experts of each layer a GPU may hold.

        All GPUs hold equally many, rounded up, where memory allows, since engines want equal numbers. Where a GPU
        holds fewer, the others take more.
        """
        limits = self.limits
        needed = self.num_experts + self.num_replicas
        level = -(-needed // self.num_gpus)
        while np.minimum(limits, level).sum() < needed:
            level += 1
        return np.minimum(limits, level)

    @property
    def limits(self) -> np.ndarray:
        """[G], how many experts of a layer each GPU has memory for, every layer alike; at most all."""
        each = self.num_layers * self.step.expert_bytes
        limits = [min(gpu.memory_bytes / each, self.num_experts) for gpu in self.topology.gpus]
        return np.floor(limits).astype(int)

    def costs(self, plan: Plan) -> list[PlacementCost]:
        """Return a plan's cost on each workload."""
        return [judge(plan, workload, self.topology, self.step) for workload in self.workloads]

    def objective(self, plan: Plan) -> float:
        """Return seconds of a step: the mean over the workloads, or the worst."""
        seconds = [cost.step_s for cost in self.costs(plan)]
        return max(seconds) if self.worst_case else sum(seconds) / len(seconds)

    def check(self, plan: Plan) -> None:
        """Refuse a plan that exceeds the slots or has more copies than experts and replicas.

        Raises:
            PlacementError: names the GPU and layer.
        """
        copies, allowed = plan.num_replicas.sum(axis=1), self.num_experts + self.num_replicas
        if copies.max() > allowed:
            raise PlacementError(
                f"the plan has {copies.max()} copies in layer {copies.argmax()}, and {allowed} are allowed: "
                f"{self.num_experts} experts and {self.num_replicas} replicas."
            )
        over = np.argwhere(plan.copies() > self.slots)
        if len(over):
            layer, gpu = over[0]
            raise PlacementError(
                f"the plan puts {plan.copies()[layer, gpu]} experts of layer {layer} on GPU {gpu}, which has "
                f"{self.slots[gpu]} slots a layer."
            )

    def _check_memory(self) -> None:
        needed = self.num_experts + self.num_replicas
        room = int(self.limits.sum())
        if room < needed:
            raise PlacementError(
                f"the GPUs of topology {self.topology.name} hold {room} experts of each layer, and {needed} are to be "
                f"placed ({self.num_experts} and {self.num_replicas} replicas, {self.step.expert_bytes:,.0f} bytes "
                f"each, {self.num_layers} layers). Use more or larger GPUs, smaller experts, or fewer replicas."
            )


@dataclass(frozen=True)
class Solution:
    """A solver's plan, its cost and its bound.

    Args:
        solver: its name.
        plan: the placement.
        objective: `Problem.objective` of the plan, seconds.
        bound: no plan that `Problem.check` allows has a lower objective.
        bound_by: the method that proves the bound.
        seconds: the solver's time.
        status: "optimal" (objective and bound agree), "feasible" (the solver ended), "time limit".
    """

    solver: str
    plan: Plan
    objective: float
    bound: float
    bound_by: str
    seconds: float
    status: str

    @property
    def gap(self) -> float:
        """(objective - bound) / bound; 0 where they agree, infinite without a bound."""
        if self.objective <= self.bound * (1 + 1e-12):
            return 0.0
        return (self.objective - self.bound) / self.bound if self.bound > 0 else float("inf")
