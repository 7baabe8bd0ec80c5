"""Regrouping: which tokens of a step run together, so that each group activates few experts.

Groups of equal size are sought with the least sum, over groups and layers, of different experts that their tokens take.
Whatever the groups, each token's own output is the same, so regrouping is exact.

Knows bits. Knows nothing of models, caches or sequences. The inner loop is `_regroup.c`, or `search_loop.py` where
that was not built.

Source: the token scheduler of ExpertFlow (arXiv 2410.17954, section 4.2), there by two-cluster K-medoids.
"""

import ctypes
import math
from collections.abc import Callable
from ctypes import POINTER, byref, c_double, c_int32, c_int64, c_uint16, c_uint64

import numpy as np

from moeflow.c_library import array_pointer, c_function
from moeflow.engine.regrouping import search_loop
from moeflow.errors import ConfigError
from moeflow.random_bits import RandomBits

HOT, COLD = 6.0, 0.3  # temperatures, in active (layer, expert) pairs
_NUM_SWAPS = 40_000  # some milliseconds; 32 tokens end within .1 % of the fewest pairs
_MIN_SWAPS_PER_TOKEN = 500  # a shorter search begins half as hot, since it has no time to cool from more
_MOST_TOKENS = 2**16 - 1  # `Search.count` counts them in 16 bits
_ARRAYS = {
    "routes": c_uint64, "group": c_int32, "any": c_uint64, "one": c_uint64, "count": c_uint16, "best": c_int32,
}  # fmt: skip


class _CState(ctypes.Structure):
    _fields_ = [
        ("tokens", c_int64), ("words", c_int64), *((name, POINTER(kind)) for name, kind in _ARRAYS.items()),
        ("random", c_uint64),
    ]  # fmt: skip


def regroup(
    routes: np.ndarray, num_groups: int, *, start: np.ndarray | None = None, num_swaps: int | None = None, seed: int = 0
) -> np.ndarray:
    """Split tokens into groups of equal size that activate few experts.

    Args:
        routes: [tokens, L, E] bool, the experts that each token takes, or is predicted to.
        num_groups: how many; sizes differ by one at most.
        start: [tokens] groups to begin from, whose sizes are kept; the order of arrival where None.
        num_swaps: swaps of two tokens to try; 40,000 where None.
        seed: of the random numbers; the same gives the same groups.

    Returns:
        [tokens] int32, the group of each token; never more active pairs than the start has.

    Raises:
        ConfigError: routes are not [tokens, L, E], there are more groups than tokens, or 65,536 tokens or more.
    """
    search = Search(routes, num_groups, start=start, seed=seed)
    search.run(_NUM_SWAPS if num_swaps is None else num_swaps)
    return search.best


def amended_groups(routes: np.ndarray, num_groups: int, start: np.ndarray) -> np.ndarray:
    """Change groups that are nearly right: a tenth of the swaps, none that makes much worse. As `regroup` else."""
    search = Search(routes, num_groups, start=start)
    search.run(_NUM_SWAPS // 10, COLD)
    return search.best


def arrival_groups(num_tokens: int, num_groups: int) -> np.ndarray:
    """Return [tokens] int32, tokens in their order in groups whose sizes differ by one at most."""
    return (np.arange(num_tokens) * num_groups // max(num_tokens, 1)).astype(np.int32)


def active_pairs(routes: np.ndarray, groups: np.ndarray) -> int:
    """Count (layer, expert) pairs that are active, summed over the groups.

    Args:
        routes: [tokens, L, E] bool.
        groups: [tokens].
    """
    return sum(int(routes[groups == group].any(axis=0).sum()) for group in np.unique(groups))


def route_words(bits: np.ndarray) -> np.ndarray:
    """Return [rows, pairs] bool as [rows, W] uint64: pair 64 w + b is bit b of word w."""
    padded = np.zeros((len(bits), -(-bits.shape[1] // 64) * 64), bool)
    padded[:, : bits.shape[1]] = bits
    return np.packbits(padded, axis=1, bitorder="little").view("<u8").astype(np.uint64, copy=False)


class Search:
    """Groups under change.

    Args:
        routes: [tokens, L, E] bool.
        num_groups: G.
        start: [tokens], see `regroup`.
        seed: of the random numbers.

    Attributes:
        routes: [tokens, W] uint64, pairs as bits.
        group, best: [tokens] int32, as they are and when fewest were active.
        any, one: [G, W] uint64, pairs that some token of a group activates, and that just one does.
        count: [G, 64 W] uint16, how many tokens do.
    """

    def __init__(self, routes: np.ndarray, num_groups: int, *, start: np.ndarray | None = None, seed: int = 0) -> None:
        routes = np.asarray(routes)
        if routes.ndim != 3 or routes.dtype != bool:
            raise ConfigError(f"routes are {routes.dtype} {list(routes.shape)}. Give bool [tokens, layers, experts].")
        tokens = len(routes)
        if tokens > _MOST_TOKENS:
            raise ConfigError(f"{tokens} tokens to regroup. Allowed: {_MOST_TOKENS}.")
        if not 1 <= num_groups <= max(tokens, 1):
            raise ConfigError(f"{num_groups} groups of {tokens} tokens. Give from 1 to as many groups as tokens.")
        self.group = arrival_groups(tokens, num_groups) if start is None else np.array(start, np.int32)
        if self.group.shape != (tokens,) or (tokens and not 0 <= self.group.min() <= self.group.max() < num_groups):
            raise ConfigError(f"the start is not a group from 0 to {num_groups - 1} for each of {tokens} tokens.")
        flat = routes.reshape(tokens, math.prod(routes.shape[1:]))
        self.routes = route_words(flat)
        self.count = np.zeros((num_groups, 64 * self.routes.shape[1]), np.uint16)
        for group in range(num_groups):
            self.count[group, : flat.shape[1]] = flat[self.group == group].sum(axis=0, dtype=np.uint16)
        self.any, self.one = route_words(self.count > 0), route_words(self.count == 1)
        self.best = self.group.copy()
        self.random = RandomBits(seed)

    def run(self, num_swaps: int, hot: float | None = None, cold: float = COLD) -> int:
        """Try swaps while the temperature falls; return by how many active pairs the best differs from the start."""
        if hot is None:
            hot = HOT if num_swaps >= _MIN_SWAPS_PER_TOKEN * len(self.group) else HOT / 2
        cooling = (cold / hot) ** (1 / max(num_swaps, 1))
        loop = _c_loop()
        if not len(self.group):
            return 0
        if loop is None:
            return search_loop.regroup(self, num_swaps, hot, cooling)
        (tokens, words), groups = self.routes.shape, len(self.count)
        shapes = {"routes": (tokens, words), "group": (tokens,), "best": (tokens,), "count": (groups, 64 * words)}
        pointers = [
            array_pointer(getattr(self, name), kind, shapes.get(name, (groups, words)))
            for name, kind in _ARRAYS.items()
        ]
        state = _CState(tokens, words, *pointers, self.random.state)
        change = loop(byref(state), num_swaps, hot, cooling)
        self.random.state = state.random
        return change


def _c_loop() -> Callable[..., int] | None:
    argtypes = (POINTER(_CState), c_int64, c_double, c_double)
    return c_function("regroup", __file__, argtypes, c_int64, without="it runs a hundred times slower")
