"""Recorded routes forced through a random model's routers: residency matters only with routes as real ones are.

A random router chooses experts almost evenly, so a cache of 45 % hits 45 % of them. Positions of a pass choose the rows
of the trace, on the device: nothing is copied, and a step that is run again takes the same routes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from make_random_moe import Shape
from moeflow.trace.convert import convert_trace
from moeflow.trace.trace import RoutingTrace

MIN_TOKENS = 64  # of a sequence that is replayed


def open_routes(job: dict[str, Any]) -> RoutingTrace:
    """Open the trace of `job["routes"]`; what `moeflow trace convert` reads is converted into the work folder once.

    Raises:
        TraceError: it is no trace and cannot be made one.
    """
    source = Path(job["routes"])
    if source.is_dir() or source.suffix == ".jsonl":
        converted = Path(job["work"]) / f"{source.name}.trace"
        if not converted.exists():
            convert_trace(source, converted)
        source = converted
    return RoutingTrace.open(source)


def routed_shape(shape: Shape, trace: RoutingTrace) -> Shape:
    """Return a shape with a trace's layers, experts and ranks; a token's experts take as many bytes as before."""
    inner = max(shape.inner * shape.top_k // trace.top_k, 1)
    layers = min(shape.layers, trace.num_layers)
    return shape._replace(layers=layers, experts=trace.num_experts, top_k=trace.top_k, inner=inner)


class ForcedRoutes:
    """Makes the routers of a Qwen3-MoE model choose what a trace says: position p of every pass takes row p.

    Rows are those of whole sequences, one after another, without repetitions and duplicates; the last is followed by
    the first.

    Args:
        model: of `load_moe`.
        trace: with as many layers as the model, or more.
        num_rows: that are taken.
    """

    def __init__(self, model: Any, trace: RoutingTrace, num_rows: int) -> None:
        rows = choose_rows(trace, num_rows)
        layers = model.model.layers
        experts = trace.experts[rows][:, : len(layers)].astype(np.int64)  # [N, L, K]
        weights = np.ones(experts.shape, np.float32) if trace.weights is None else trace.weights[rows][:, : len(layers)]
        weights = weights / weights.sum(-1, keepdims=True)
        self.num_rows = len(rows)
        self._positions: torch.Tensor | None = None  # [tokens] of the pass under way
        self._hooks = [model.model.rotary_emb.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for number, layer in enumerate(layers):
            chosen = torch.from_numpy(experts[:, number].copy()).to(model.device)
            factors = torch.from_numpy(weights[:, number].copy()).to(model.device, model.dtype)
            self._hooks.append(layer.mlp.gate.register_forward_hook(_forced(self, chosen, factors)))

    def remove(self) -> None:
        """Let the routers choose again."""
        for hook in self._hooks:
            hook.remove()

    def rows(self, num_tokens: int) -> torch.Tensor:
        """Return the row of each token of the pass under way, [num_tokens]."""
        assert self._positions is not None, "the rotary embedding runs before the layers"
        positions = self._positions.reshape(-1)
        if len(positions) != num_tokens:  # one row of positions for all sequences
            positions = positions.repeat(num_tokens // len(positions))
        return positions % self.num_rows

    def _begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]


def _forced(routes: ForcedRoutes, chosen: torch.Tensor, factors: torch.Tensor) -> Any:
    """Return the hook of one router; chosen and factors [N, K]."""

    def force(module: Any, args: tuple, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, scores, _ = output
        rows = routes.rows(len(logits))
        return logits, factors[rows].to(scores.dtype), chosen[rows]

    return force


def choose_rows(trace: RoutingTrace, num_rows: int) -> np.ndarray:
    """Return row numbers of whole sequences, the first that together have `num_rows` rows, or all that fit."""
    found: list[np.ndarray] = []
    everyone = np.arange(len(trace))
    for number, rows in zip(trace.sequence_numbers.tolist(), trace.sequences(), strict=True):
        facts = trace.sequence_facts[number] if number < len(trace.sequence_facts) else {}
        if len(everyone[rows]) >= MIN_TOKENS and not (facts.get("repetition") or facts.get("duplicate")):
            found.append(everyone[rows])
        if sum(map(len, found)) >= num_rows:
            break
    return np.concatenate(found or [everyone])[:num_rows]
