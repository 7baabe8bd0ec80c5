"""The cost of a placement: one function judges every solver's plan.

A step sends `assignments` (token, expert) pairs through every layer. Its cost is the slowest GPU's compute and the
slowest link's transfer, summed over the layers.

An expert's compute on a GPU is the larger of its arithmetic and of the reading of its weights, if any token comes:
max(n * flops / flops_per_s, (1 - exp(-n)) * bytes / memory_bytes_per_s) for n expected tokens. Large n is prefill,
small n decode.

A step names one of two ways for its tokens:

- "path", MoETuner's: a token goes from its experts of layer l straight to those of layer l + 1. The traffic from GPU a
  to GPU b is the share of transitions (i, j) with i on a and j on b.
- "dispatch", as engines do: tokens live on GPUs in equal parts; each assignment whose expert is elsewhere carries the
  token there (dispatch) and the expert's output back (combine), each in a transfer of its own.

Source: cost of a mapping as compute imbalance and pairwise transfer, MoETuner (arXiv 2502.06643, section 4).
"""

from dataclasses import dataclass

import numpy as np

from moeflow.errors import PlacementError
from moeflow.placement.plan import Plan
from moeflow.placement.topology import Topology
from moeflow.placement.workload import Workload

COMMUNICATIONS = ("path", "dispatch")


@dataclass(frozen=True)
class StepShape:
    """The size of a step.

    Args:
        assignments: (token, expert) pairs a layer serves in a step, on all GPUs together: tokens * top_k.
        token_bytes: bytes of one token's hidden state.
        expert_bytes: bytes of one expert's weights.
        expert_flops: operations of one expert on one token, multiply and add counted as two.
        communication: "path" or "dispatch", see the module.

    Raises:
        PlacementError: a size that is not above 0, or an unknown communication.
    """

    assignments: float = 32768.0
    token_bytes: int = 2 * 4096
    expert_bytes: int = 2 * 3 * 4096 * 2048
    expert_flops: int = 2 * 3 * 4096 * 2048
    communication: str = "path"

    def __post_init__(self) -> None:
        for name in ("assignments", "token_bytes", "expert_bytes", "expert_flops"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise PlacementError(f"a step with {name} {getattr(self, name)}. It must be above 0.")
        if self.communication not in COMMUNICATIONS:
            raise PlacementError(
                f"communication {self.communication!r} is unknown. Allowed: {', '.join(COMMUNICATIONS)}."
            )

    def expert_seconds(self, tokens: np.ndarray, topology: Topology) -> np.ndarray:
        """Return [..., G], an expert's time on each GPU, for [...] expected tokens."""
        tokens = np.asarray(tokens)[..., None]
        flops = np.array([gpu.flops_per_s for gpu in topology.gpus])
        reading = np.array([gpu.memory_bytes_per_s for gpu in topology.gpus])
        return np.maximum(tokens * self.expert_flops / flops, -np.expm1(-tokens) * self.expert_bytes / reading)


@dataclass(frozen=True)
class PlacementCost:
    """The cost of one step of one workload under one plan.

    Args:
        tokens: [L, G], assignments each GPU serves.
        activated: [L, G], experts each GPU is expected to activate.
        compute_s: [L, G].
        path_bytes: [L - 1, G, G], from row to column, diagonal (bytes that stay) included; None without transitions.
        dispatch_bytes: [L, G, G], tokens to experts, diagonal included; combine sends as many back.
        link_s: [L], the slowest link's time a layer, by the step's communication.
        colocated: share of the expert pairs that a token takes in one layer that lie on one GPU; None where unknown.
    """

    tokens: np.ndarray
    activated: np.ndarray
    compute_s: np.ndarray
    path_bytes: np.ndarray | None
    dispatch_bytes: np.ndarray
    link_s: np.ndarray
    colocated: float | None

    @property
    def step_s(self) -> float:
        """Seconds of a step: slowest GPU and slowest link, summed over the layers."""
        return float(self.compute_s.max(axis=1).sum() + self.link_s.sum())

    @property
    def imbalance(self) -> float:
        """Tokens of the busiest GPU over the mean, mean over the layers."""
        return _imbalance(self.tokens)

    @property
    def activated_imbalance(self) -> float:
        """Activated experts of the GPU with most over the mean, mean over the layers."""
        return _imbalance(self.activated)

    @property
    def compute_imbalance(self) -> float:
        """Compute time of the slowest GPU over the mean, mean over the layers."""
        return _imbalance(self.compute_s)

    def known_path_bytes(self) -> np.ndarray:
        """Return `path_bytes` of a workload that has transitions, as every workload of a problem by path has."""
        assert self.path_bytes is not None, "a workload without transitions"
        return self.path_bytes

    @property
    def crossing(self) -> float | None:
        """Share of layer-to-layer transitions that change GPU; None without transitions."""
        return None if self.path_bytes is None else _off_diagonal_share(self.path_bytes)

    @property
    def dispatch_crossing(self) -> float:
        """Share of assignments whose expert is on another GPU than the token."""
        return _off_diagonal_share(self.dispatch_bytes)

    def summary(self) -> dict:
        """Return the figures that tables show, units in the names."""
        return {
            "imbalance": self.imbalance,
            "activated_imbalance": self.activated_imbalance,
            "compute_imbalance": self.compute_imbalance,
            "crossing": self.crossing,
            "path_bytes": None if self.path_bytes is None else _off_diagonal(self.path_bytes),
            "dispatch_crossing": self.dispatch_crossing,
            "dispatch_bytes": 2 * _off_diagonal(self.dispatch_bytes),
            "colocated": self.colocated,
            "compute_s": float(self.compute_s.max(axis=1).sum()),
            "link_s": float(self.link_s.sum()),
            "step_s": self.step_s,
        }


def judge(plan: Plan, workload: Workload, topology: Topology, step: StepShape) -> PlacementCost:
    """Return the cost of a plan on a workload.

    Raises:
        PlacementError: plan, workload and topology are not of one model and machine, or the step's communication
            needs transitions that the workload does not have.
    """
    if (plan.num_layers, plan.num_experts) != workload.shape:
        raise PlacementError(
            f"the plan is for {plan.num_layers} layers of {plan.num_experts} experts, and {workload.name} has "
            f"{workload.num_layers} of {workload.num_experts}. Give counts of the plan's model."
        )
    if plan.num_gpus != topology.num_gpus:
        raise PlacementError(
            f"the plan is for {plan.num_gpus} GPUs, and topology {topology.name} has {topology.num_gpus}."
        )
    if step.communication == "path" and workload.transitions is None:
        raise PlacementError(
            f"{workload.name} counts no transitions between layers, so nothing is known of the path of its tokens. "
            "Give a trace, or ask for communication by dispatch."
        )
    shares = plan.shares()
    tokens_of = workload.shares() * step.assignments  # [L, E]
    per_replica = tokens_of / plan.num_replicas
    mask = plan.mask()
    tokens = np.einsum("le,leg->lg", tokens_of, shares)
    path = _path_bytes(workload, shares, step)
    dispatch = np.broadcast_to(tokens[:, None, :] / topology.num_gpus, (len(tokens), *2 * (topology.num_gpus,)))
    dispatch = dispatch * step.token_bytes
    bandwidth = topology.bandwidth_bytes_per_s
    if step.communication == "path":
        link_s = (path / bandwidth).max(axis=(1, 2), initial=0.0)
    else:
        there, back = dispatch / bandwidth, dispatch.transpose(0, 2, 1) / bandwidth
        link_s = sum(part.reshape(len(tokens), -1).max(axis=1) for part in (there, back))
    return PlacementCost(
        tokens=tokens,
        activated=np.einsum("le,leg->lg", -np.expm1(-per_replica), mask),
        compute_s=np.where(mask, step.expert_seconds(per_replica, topology), 0.0).sum(axis=1),
        path_bytes=path,
        dispatch_bytes=dispatch,
        link_s=link_s,
        colocated=_colocated(workload, shares),
    )


def _path_bytes(workload, shares, step) -> np.ndarray | None:
    if workload.transitions is None:
        return None
    out = np.zeros((workload.num_layers - 1, *2 * (shares.shape[2],)))
    for layer, counts in enumerate(workload.transitions):
        out[layer] = shares[layer].T @ counts @ shares[layer + 1]
    totals = workload.transitions.sum(axis=(1, 2))[:, None, None]
    return out / np.maximum(totals, 1e-300) * step.assignments * step.token_bytes


def _colocated(workload, shares) -> float | None:
    if workload.coactivation is None or not workload.coactivation.sum():
        return None
    together = sum(
        float(((counts @ held) * held).sum()) for counts, held in zip(workload.coactivation, shares, strict=True)
    )
    return together / float(workload.coactivation.sum())


def _imbalance(values) -> float:
    return float((values.max(axis=1) / values.mean(axis=1)).mean())


def _off_diagonal(matrices) -> float:
    return float(matrices.sum() - np.trace(matrices, axis1=1, axis2=2).sum())


def _off_diagonal_share(matrices) -> float:
    total = float(matrices.sum())
    return _off_diagonal(matrices) / total if total else 0.0
