"""Proven best split of a few dozen tokens into two groups, by branch and bound.

Where an integer program gives up at twenty tokens, this proves 2 x 16 of real routes in a fraction of a second, since a
good split is known from the search before it begins. Without its C loop it is the integer program.
"""

import ctypes
from ctypes import POINTER, byref, c_int8, c_int64, c_uint64
from typing import Any

import numpy as np

from moeflow.c_library import c_function
from moeflow.engine.regrouping.oracles.exact import exact_groups
from moeflow.engine.regrouping.search import active_pairs, regroup, route_words
from moeflow.errors import ConfigError

_NUM_STEPS = 1_000_000_000  # some half a minute


class _CState(ctypes.Structure):
    _fields_ = [
        ("tokens", c_int64), ("words", c_int64), ("half", c_int64), ("routes", POINTER(c_uint64)),
        ("rest", POINTER(c_uint64)), ("any", POINTER(c_uint64)), ("side", POINTER(c_int8)), ("tried", POINTER(c_int8)),
        ("best", POINTER(c_int8)), ("filled", POINTER(c_int64)), ("both", POINTER(c_int64)),
        ("fewest", c_int64),
    ]  # fmt: skip


def best_split(routes: np.ndarray, *, num_steps: int = _NUM_STEPS) -> tuple[np.ndarray, bool]:
    """Split tokens into two groups, whose sizes differ by one at most, that activate the fewest experts there can be.

    Args:
        routes: [tokens, L, E] bool.
        num_steps: of the search, after which the best so far counts.

    Returns:
        [tokens] int32 groups, 0 or 1, and whether they are proven to be the best.

    Raises:
        ConfigError: fewer than two tokens, or routes that are not bool [tokens, L, E].
    """
    routes = np.asarray(routes)
    tokens = len(routes)
    if tokens < 2:
        raise ConfigError(f"{tokens} tokens in 2 groups. Give at least two.")
    search = c_function("split", __file__, (POINTER(_CState), c_int64), c_int64, without="an integer program runs")
    if search is None:
        return exact_groups(routes, 2)
    known = regroup(routes, 2)
    flat = routes.reshape(tokens, -1)
    shared = flat & (flat.sum(axis=0) > 1)
    order = np.argsort(-shared.sum(axis=1), kind="stable")  # costly tokens first, so that bad splits show early
    words = np.ascontiguousarray(route_words(flat[order]))
    rest = np.zeros((tokens + 1, words.shape[1]), np.uint64)
    for token in range(tokens - 1, -1, -1):
        rest[token] = rest[token + 1] | words[token]
    arrays = {
        "routes": words, "rest": rest, "any": np.zeros((tokens + 1, 2, words.shape[1]), np.uint64),
        "side": np.zeros(tokens, np.int8), "tried": np.zeros(tokens + 1, np.int8), "best": np.zeros(tokens, np.int8),
        "filled": np.zeros(tokens + 1, np.int64), "both": np.zeros((tokens, 2), np.int64),
    }  # fmt: skip
    fields: dict[str, Any] = {name: kind for name, kind, *_ in _CState._fields_}
    pointers = {name: array.ctypes.data_as(fields[name]) for name, array in arrays.items()}
    both = active_pairs(routes, known) - int(flat.any(axis=0).sum())
    state = _CState(tokens=tokens, words=words.shape[1], half=-(-tokens // 2), fewest=both, **pointers)
    proven = search(byref(state), num_steps) >= 0
    if state.fewest == both:  # none better was found
        return known, proven
    groups = np.empty(tokens, np.int32)
    groups[order] = arrays["best"]
    if np.bincount(groups, minlength=2).argmax():
        groups = 1 - groups
    return groups, proven
