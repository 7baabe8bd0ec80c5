"""Locality of a trace: reuse within sequences, skew, and demand by layer. Arrays in, numbers out."""

from typing import NamedTuple

import numpy as np


class Locality(NamedTuple):
    """Reuse and skew of routing, which decide the hits of a cache.

    Args:
        reuse: tokens back -> share of the demanded experts that one of so many tokens before demanded, same layer.
        chance: tokens back -> that share were routing even and independent.
        hottest_quarter: [L], share of a layer's demand that its most demanded quarter of experts takes.
        idle: experts that nothing demanded.
    """

    reuse: dict[int, float]
    chance: dict[int, float]
    hottest_quarter: np.ndarray
    idle: int


def demand_by_expert(experts: np.ndarray, experts_per_layer: tuple[int, ...]) -> np.ndarray:
    """Count uses: experts [N, L, K] -> float [L, E], NaN where a layer has no such expert."""
    num_experts = max(experts_per_layer)
    demand = np.full((len(experts_per_layer), num_experts), np.nan)
    for layer, size in enumerate(experts_per_layer):
        uses = np.bincount(experts[:, layer].ravel(), minlength=num_experts)
        demand[layer, :size] = uses[:size]
    return demand


def measure_locality(
    experts: np.ndarray,
    starts: np.ndarray,
    experts_per_layer: tuple[int, ...],
    *,
    distances: tuple[int, ...] = (1, 4, 16),
) -> Locality:
    """Measure reuse within sequences and skew over all of them.

    Args:
        experts: [N, L, K]; numbers of a layer's size or more stand for none.
        starts: [S + 1], rows at which sequences start, and the end of the last.
        experts_per_layer: [L].
        distances: tokens back.
    """
    num_tokens, _, top_k = experts.shape
    place = np.arange(num_tokens) - np.repeat(starts[:-1], np.diff(starts))  # of a token in its sequence
    reused, counted, chance = (dict.fromkeys(distances, 0.0) for _ in range(3))
    for layer, size in enumerate(experts_per_layer):
        demanded = np.zeros((num_tokens, max(experts_per_layer) + 1), bool)
        np.put_along_axis(demanded, np.minimum(experts[:, layer].astype(np.int64), size), True, axis=1)
        demanded = demanded[:, :size]
        recent = np.zeros_like(demanded)
        for back in range(1, max(distances) + 1):
            inside = place >= back
            recent[inside] |= demanded[np.flatnonzero(inside) - back]
            if back in reused:
                known = place >= 1
                reused[back] += (demanded & recent)[known].sum()
                counted[back] += demanded[known].sum()
                drawn = 1 - (1 - top_k / size) ** np.minimum(place[known], back)
                chance[back] += (drawn * demanded[known].sum(-1)).sum()
    demand = demand_by_expert(experts, experts_per_layer)
    quarters = []
    for layer, size in enumerate(experts_per_layer):
        uses = np.sort(demand[layer, :size])[::-1]
        quarters.append(uses[: max(1, size // 4)].sum() / max(uses.sum(), 1))
    return Locality(
        {distance: float(reused[distance] / max(counted[distance], 1)) for distance in distances},
        {distance: float(chance[distance] / max(counted[distance], 1)) for distance in distances},
        np.array(quarters),
        int((demand == 0).sum()),
    )
