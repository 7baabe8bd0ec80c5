"""States that a model keeps beside keys and values: convolutions' last inputs, sums of linear attention and of Mamba.

They lie in transformers' own cache layers, one tensor each, whose size does not depend on the length of a sequence.
"""

from typing import Any, NamedTuple

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

STATE_LAYERS = (LinearAttentionLayer, *filter(None, [getattr(cache_utils, "DummyLayer", None)]))
"""Layers that keep states alone, or nothing: transformers 5.23 has a class of these, 5.17 has none."""

HYBRID_LAYERS = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
"""Layers that keep states beside keys and values."""

_KINDS = ("conv_states", "recurrent_states")


class StateName(NamedTuple):
    """Which state of a cache.

    Args:
        layer: its number.
        kind: "conv_states" or "recurrent_states".
        place: among those of its layer and kind.
    """

    layer: int
    kind: str
    place: int


def state_names(layers: list[Any]) -> list[StateName]:
    """List the states that are set, by layer."""
    return [
        StateName(number, kind, place)
        for number, layer in enumerate(layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        for kind in _KINDS
        for place, state in getattr(layer, kind).items()
        if state is not None
    ]


def state_of(layers: list[Any], name: StateName) -> torch.Tensor | None:
    """Return a state where it lies, without gaps; None where the layer has none yet, or records past ones."""
    layer = layers[name.layer]
    states = getattr(layer, name.kind)
    state = states[name.place]
    if state is None or layer.record_past or not layer.has_previous_state[name.place]:
        return None
    if not state.is_contiguous():
        states[name.place] = state = state.contiguous()
    return state


def put_state(layers: list[Any], name: StateName, state: torch.Tensor) -> None:
    """Let a layer have this state."""
    getattr(layers[name.layer], name.kind)[name.place] = state
