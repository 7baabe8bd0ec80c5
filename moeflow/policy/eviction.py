"""Which expert leaves when a slot is needed: the score of each slot, by policy."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from moeflow.policy.cache import ExpertCache


def _lru(cache: "ExpertCache") -> np.ndarray:
    return cache.last_event


def _lfu(cache: "ExpertCache") -> np.ndarray:
    return cache.frequency


def _lfru(cache: "ExpertCache") -> np.ndarray:
    # Among equals the most recent goes: its layer is the last to run again.
    return cache.frequency / (cache.ages() + 1) - 1e-12 * cache.last_event


def _static(cache: "ExpertCache") -> np.ndarray:
    """The first experts to arrive stay for good; the rest share the transient slots by age."""
    fixed = np.arange(cache.num_slots) < min(cache.limit, cache.num_slots) - cache.num_transient
    return np.where(fixed, 1e300, cache.last_event)


def _forecast(cache: "ExpertCache") -> np.ndarray:
    """The expert whose slot is worth the least by prediction goes; without a prediction, lfru's."""
    if cache.forecast is None:
        return _lfru(cache)
    return cache.forecast.worth[cache._layer, cache._expert].astype(np.float64)


# Each policy maps a cache to [num_slots] scores; the lowest evictable score is evicted.
# lfru: frequency / (age + 1), arXiv 2608.07911.
POLICIES: dict[str, Callable[["ExpertCache"], np.ndarray]] = {
    "lru": _lru,
    "lfu": _lfu,
    "lfru": _lfru,
    "static": _static,
    "forecast": _forecast,
}
