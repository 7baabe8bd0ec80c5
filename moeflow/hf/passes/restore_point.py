"""A key-value cache as it was before a pass, so that the pass may be run again."""

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from moeflow.hf.passes.caches.growing_cache import GrowingLayer

_KINDS = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer)


def restore_point(cache: object) -> Callable[[], None] | None:
    """Return what puts a cache back to how it is now; None where a pass changes tensors that it would need.

    Layers of these kinds make new tensors, or write behind the positions that they keep: what they hold now stays.

    Args:
        cache: that a model is called with.
    """
    if getattr(cache, "may_run_again", False):  # the engine's
        return _nothing
    layers: list[Any] = list(cache.layers) if isinstance(cache, Cache) else []
    if not layers or any(type(layer) not in _KINDS for layer in layers):
        return None
    before = [dict(vars(layer)) for layer in layers]

    def restore() -> None:
        for layer, held in zip(layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(held)

    return restore


def _nothing() -> None:
    pass
