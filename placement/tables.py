"""A placement problem as arrays, which inner loops and bounds read instead of the problem itself.

Knows problems. Knows nothing of searches.
"""

import numpy as np

from moeflow.errors import PlacementError
from moeflow.placement.problem import Problem


class Tables:
    """A problem as the loop reads it: W workloads, L layers, E experts, G GPUs.

    Args:
        problem: the placement problem.
        weights: [W], of the workloads, sum 1; equal where None.
        balance: factor of compute; with 0 only traffic counts.
        may_replicate: whether replicas may go to other experts; else only the places of copies change.
        slowest: by path, whether the slowest link counts, or the mean over all.

    Raises:
        PlacementError: another number of weights than workloads, or one that is no number.

    Attributes:
        slots: [G]. num_copies, free_slots: of a layer.
        tokens: [W, L, E] expected assignments a step. active: [W, L, E, R], experts expected active on 1 to R copies.
        arithmetic_s, reading_s, link_s: [G], seconds a token, an active expert, and a token's transfers take.
        weights: [W].
        traffic: [L - 1, E, E], seconds of a transition that crosses a link of distance 1, where the mean counts.
        distance: [G, G], seconds a byte in units of the slowest link's; diagonal 0.
        transitions: [W, L - 1, E, E], shares of 1 in each layer, where the slowest link counts.
        crossing_s: [G, G], seconds of a link that all of a layer's transitions cross; diagonal 0.
        traffic_back, transitions_back: the same, each layer transposed. Arrays that do not count are None.
    """

    def __init__(
        self,
        problem: Problem,
        weights: np.ndarray | None = None,
        *,
        balance: float = 1.0,
        may_replicate: bool = True,
        slowest: bool = False,
    ) -> None:
        step, gpus, num_gpus = problem.step, problem.topology.gpus, problem.num_gpus
        count = len(problem.workloads)
        self.problem, self.balance = problem, balance
        self.weights = np.full(count, 1 / count) if weights is None else np.ascontiguousarray(weights, np.float64)
        if self.weights.shape != (count,) or not np.isfinite(self.weights).all():
            raise PlacementError(f"weights {self.weights.tolist()} of {count} workloads. Give one number for each.")
        self.slots = problem.slots.astype(np.int64)
        self.num_copies = problem.num_experts + problem.num_replicas
        self.free_slots = int(self.slots.sum()) - self.num_copies
        self.may_replicate = int(may_replicate and problem.num_replicas > 0)
        self.tokens = np.stack([workload.shares() * step.assignments for workload in problem.workloads])
        most = min(num_gpus, problem.num_replicas + 1)
        self.active = -np.expm1(-self.tokens[..., None] / np.arange(1, most + 1))
        self.arithmetic_s = np.array([balance * step.expert_flops / gpu.flops_per_s for gpu in gpus])
        self.reading_s = np.array([balance * step.expert_bytes / gpu.memory_bytes_per_s for gpu in gpus])
        self.link_s = np.zeros(num_gpus)
        self.traffic: np.ndarray | None = None
        self.traffic_back: np.ndarray | None = None
        self.transitions: np.ndarray | None = None
        self.transitions_back: np.ndarray | None = None
        per_byte = 1 / problem.topology.bandwidth_bytes_per_s  # the diagonal is 0
        unit = float(per_byte.max()) or 1.0
        self.distance = np.ascontiguousarray(per_byte / unit)
        self.crossing_s = np.ascontiguousarray(per_byte * step.assignments * step.token_bytes)
        if step.communication == "dispatch":
            each = per_byte.max(axis=0) + per_byte.max(axis=1)
            self.link_s = balance * each * step.token_bytes / num_gpus
            return
        transitions = np.stack([workload.known_transitions() for workload in problem.workloads])
        transitions = transitions / np.maximum(transitions.sum(axis=(2, 3), keepdims=True), 1e-300)
        if slowest:
            self.transitions, self.transitions_back = transitions, _transposed(transitions)
        else:
            per_pair = step.assignments * step.token_bytes * unit / max(num_gpus * (num_gpus - 1), 1)
            self.traffic = np.tensordot(self.weights, transitions, axes=1) * per_pair
            self.traffic_back = _transposed(self.traffic)

    def copy_seconds(self, workload: int, layer: int, expert: int, copies: int, gpu: int) -> float:
        """Return the seconds that one of an expert's copies takes on a GPU."""
        tokens = float(self.tokens[workload, layer, expert]) / copies
        arithmetic = tokens * float(self.arithmetic_s[gpu])
        reading = float(self.active[workload, layer, expert, copies - 1]) * float(self.reading_s[gpu])
        return max(arithmetic, reading) + tokens * float(self.link_s[gpu])

    def seconds(self, num_copies: np.ndarray) -> np.ndarray:
        """Return [W, L, E, G], the seconds of a copy on each GPU, where experts have [L, E] copies."""
        tokens = self.tokens / num_copies
        active = np.take_along_axis(self.active, (num_copies - 1)[None, :, :, None], axis=3)
        tokens = tokens[..., None]
        return np.maximum(tokens * self.arithmetic_s, active * self.reading_s) + tokens * self.link_s


def _transposed(layers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.swapaxes(layers, -1, -2))
