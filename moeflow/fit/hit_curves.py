"""Hit rates at a residency: from a trace of the model, else from curves of measured models, and which.

Knows shares. Knows nothing of bytes or seconds.
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

from moeflow.errors import TraceError
from moeflow.fit.measured_curves import CURVES, RESIDENCIES

_POLICIES = (("lfru", False), ("lfru", True), ("belady", True))  # low: cold; middle: warm; high: with foresight


class Range(NamedTuple):
    """An expectation, and between what it may lie."""

    low: float
    mid: float
    high: float


class HitCurve(NamedTuple):
    """Hit rates of decode steps over the share of all experts that is resident.

    Args:
        source: whose routing it was, for the table.
        residencies: percent, rising.
        low: an LFRU cache that is empty as a sequence starts.
        mid: one that a sequence leaves to the next.
        high: Belady's, which no prediction passes.
    """

    source: str
    residencies: tuple[float, ...]
    low: tuple[float, ...]
    mid: tuple[float, ...]
    high: tuple[float, ...]

    def at(self, share: float) -> Range:
        """Return the hit rate at a share of all experts, 0 to 1."""
        low, mid, high = (
            _interpolate(100 * share, self.residencies, rates) for rates in (self.low, self.mid, self.high)
        )
        return Range(min(low, mid), mid, max(mid, high))


def _interpolate(percent: float, residencies: tuple[float, ...], rates: tuple[float, ...]) -> float:
    """Return a rate between two measured ones; nothing hits without memory, everything with all of it."""
    points = [(0.0, 0.0), *zip(residencies, rates, strict=True), (100.0, 1.0)]
    percent = min(max(percent, 0.0), 100.0)
    for (left, low), (right, high) in itertools.pairwise(points):
        if percent <= right:
            return low + (high - low) * (percent - left) / (right - left)
    return 1.0


def curve_for(num_experts: int, top_k: int) -> HitCurve:
    """Return the curve of the measured model whose experts a layer and experts a token are nearest.

    Args:
        num_experts: of one layer.
        top_k: that a token takes.
    """

    def distance(shape: tuple[int, int]) -> float:
        return abs(math.log(shape[0] / num_experts)) + abs(math.log(shape[1] / top_k))

    shape = min(CURVES, key=distance)
    name, low, mid, high = CURVES[shape]
    return HitCurve(f"{name} ({shape[0]} experts, top-{shape[1]})", RESIDENCIES, low, mid, high)


def curve_of_trace(
    file: Path,
    residencies: tuple[float, ...] = RESIDENCIES,
    *,
    most_tokens: int | None = None,
    of: tuple[int, int, int] | None = None,
) -> HitCurve:
    """Replay a trace of the model itself.

    Args:
        file: a routing trace.
        residencies: percent of all experts; those under one layer's top-k are left out.
        of: layers with experts, experts of a layer and of a token that the trace must have; any when None.
        most_tokens: replay whole sequences up to about so many; all when None.

    Raises:
        TraceError: no trace, a damaged one, or another model's.
        ConfigError: nothing to replay.
    """
    from moeflow.replay.demand import replay_trace
    from moeflow.trace.trace import RoutingTrace

    trace = RoutingTrace.open(file)
    found = (trace.num_layers, max(trace.experts_per_layer), trace.top_k)
    if of is not None and found != of:
        raise TraceError(
            f"{file} is of a model with (layers, experts, experts a token) {found}, and this one has {of}. Record a "
            "trace of this model: moeflow trace record."
        )
    if most_tokens is not None:
        lengths = [len(trace.sequence[rows]) for rows in trace.sequences()]
        count = next((n for n in range(len(lengths)) if sum(lengths[: n + 1]) > most_tokens), len(lengths))
        trace = trace.select(trace.sequence_numbers[: max(count, 1)])
    all_experts = sum(trace.experts_per_layer)
    kept = tuple(r for r in residencies if r * all_experts / 100 >= trace.top_k + 1)
    rates = [
        tuple(row["hit_rate"] for row in replay_trace(trace, kept, [policy], warm=warm)) for policy, warm in _POLICIES
    ]
    return HitCurve(f"the trace {file.name}", kept, *rates)
