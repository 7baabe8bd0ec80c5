"""Counts of a model's routing: uses of each expert, transitions between layers, experts chosen together.

Knows numbers. Knows nothing of traces, files or GPUs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moeflow.errors import PlacementError

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Workload:
    """Counts of L MoE layers with E experts each. Only ratios matter: a step's size is the `StepShape`'s.

    Args:
        name: its name in tables.
        load: [L, E], routed (token, expert) assignments. Finite, not negative, no layer without any.
        transitions: [L - 1, E, E], pairs (expert of layer l, expert of layer l + 1) of one token; None where unknown.
        coactivation: [L, E, E], pairs of experts that one token takes in one layer, diagonal 0; None where unknown.
        top_k: experts a token takes; None where unknown.
        first_layer: the model's number of the layer in row 0; dense layers stand before it.

    Raises:
        PlacementError: shapes disagree, a count is negative or not finite, or a layer has no load.
    """

    name: str
    load: np.ndarray
    transitions: np.ndarray | None = None
    coactivation: np.ndarray | None = None
    top_k: int | None = None
    first_layer: int = 0

    def __post_init__(self) -> None:
        load = _counts(self.name, "load", self.load, None)
        if load.ndim != 2 or not load.size:
            raise PlacementError(
                f"{self.name}: load has shape {list(load.shape)}. Give [layers, experts], none of them 0."
            )
        layers, experts = load.shape
        empty = np.flatnonzero(load.sum(axis=1) == 0)
        if len(empty):
            raise PlacementError(
                f"{self.name}: {len(empty)} of {layers} layers have no load, the first is row {empty[0]}. Dense layers "
                "may stand before all others; any other layer without load says that its counts are missing."
            )
        object.__setattr__(self, "load", load)
        for name, shape in (
            ("transitions", (layers - 1, experts, experts)),
            ("coactivation", (layers, *2 * (experts,))),
        ):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _counts(self.name, name, getattr(self, name), shape))

    @classmethod
    def of_counts(cls, name: str, load: np.ndarray, **others: Any) -> "Workload":
        """Make one of a whole model's rows: leading rows without load are dense layers and are left out."""
        load = _counts(name, "load", load, None)
        used = np.flatnonzero(load.any(axis=1)) if load.ndim == 2 else np.zeros(1, int)
        first = int(used[0]) if len(used) else 0
        return cls(name, load[first:], first_layer=first, **others)

    @classmethod
    def of_routes(cls, name: str, experts: np.ndarray, num_experts: int) -> "Workload":
        """Count the routes of tokens.

        Args:
            name: its name in tables.
            experts: [N, L, K], each token's experts in each layer; num_experts or more means none.
            num_experts: E.
        """
        num_tokens, num_layers, top_k = experts.shape
        load = np.zeros((num_layers, num_experts))
        transitions = np.zeros((max(num_layers - 1, 0), num_experts, num_experts))
        coactivation = np.zeros((num_layers, num_experts, num_experts))
        for begin in range(0, num_tokens, _ROWS_AT_ONCE):
            previous = None
            for layer in range(num_layers):
                chosen = _chosen(experts[begin : begin + _ROWS_AT_ONCE, layer], num_experts)
                load[layer] += chosen.sum(axis=0)
                coactivation[layer] += chosen.T @ chosen
                if previous is not None:
                    transitions[layer - 1] += previous.T @ chosen
                previous = chosen
        coactivation[:, np.arange(num_experts), np.arange(num_experts)] = 0
        return cls(name, load, transitions, coactivation, top_k)

    @property
    def num_layers(self) -> int:
        return self.load.shape[0]

    @property
    def num_experts(self) -> int:
        return self.load.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(L, E)."""
        return self.num_layers, self.num_experts

    def known_transitions(self) -> np.ndarray:
        """Return the transitions of a workload that has them, as every workload of a problem by path has."""
        assert self.transitions is not None, f"{self.name} counts no transitions"
        return self.transitions

    def shares(self) -> np.ndarray:
        """Return [L, E], each layer's load as shares of 1."""
        return self.load / self.load.sum(axis=1, keepdims=True)


def _chosen(experts, num_experts) -> np.ndarray:
    """Return [N, K] ids as [N, E] 0 and 1 (float32: counts in one block stay below 2^24)."""
    chosen = np.zeros((len(experts), num_experts), np.float32)
    rows, ranks = np.nonzero(experts < num_experts)
    chosen[rows, experts[rows, ranks]] = 1
    return chosen


def _counts(owner, name, values, shape) -> np.ndarray:
    try:
        values = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise PlacementError(f"{owner}: {name} is not an array of numbers. Rows must be equally long.") from None
    if shape is not None and values.shape != shape:
        raise PlacementError(f"{owner}: {name} has shape {list(values.shape)}, and {list(shape)} is wanted here.")
    bad = np.argwhere(~(np.isfinite(values) & (values >= 0)))
    if len(bad):
        place = tuple(int(index) for index in bad[0])
        raise PlacementError(
            f"{owner}: {name} at {list(place)} is {values[place]}. Counts are finite and not negative: count again."
        )
    return values
