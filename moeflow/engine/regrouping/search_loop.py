"""The regrouping's inner loop in plain Python: the meaning of a swap, the oracle of `_regroup.c`, and the fallback for
an installation without a compiler.

Knows the arrays of a `Search`. Knows nothing of routes or schedules.
"""

import math

import numpy as np


def regroup(search, num_swaps: int, hot: float, cooling: float) -> int:
    """Try swaps of two tokens of different groups; return by how many active pairs the best differs from the first.

    A swap is kept if no more pairs are active, else with probability exp(-more / temperature).

    Args:
        search: `search.Search`, whose arrays are changed in place.
        num_swaps: how many to try.
        hot: the first temperature, in pairs.
        cooling: factor of the temperature at each swap.
    """
    routes = [_whole(row) for row in search.routes]
    active, single = [_whole(row) for row in search.any], [_whole(row) for row in search.one]
    change = best = 0
    temperature = hot
    for _ in range(num_swaps):
        a, b = search.random.below(len(routes)), search.random.below(len(routes))
        source, target = int(search.group[a]), int(search.group[b])
        if source != target:
            leaves, comes = routes[a] & ~routes[b], routes[b] & ~routes[a]
            more = (comes & ~active[source]).bit_count() + (leaves & ~active[target]).bit_count()
            fewer = (leaves & single[source]).bit_count() + (comes & single[target]).bit_count()
            delta = more - fewer
            if delta <= 0 or delta < -temperature * math.log(search.random.unit()):
                _move(search, a, source, target)
                _move(search, b, target, source)
                for group in (source, target):
                    active[group], single[group] = _whole(search.any[group]), _whole(search.one[group])
                change += delta
                if change < best:
                    best = change
                    search.best[:] = search.group
        temperature *= cooling
    return best


def _move(search, token, source, target) -> None:
    """Take a token from one group to another."""
    held = np.unpackbits(search.routes[token].view(np.uint8), bitorder="little").astype(bool)
    search.count[source, held] -= 1
    search.count[target, held] += 1
    for group in (source, target):
        for words, bits in ((search.any, search.count[group] > 0), (search.one, search.count[group] == 1)):
            words[group] = np.packbits(bits, bitorder="little").view(np.uint64)
    search.group[token] = target


def _whole(words) -> int:
    """Return a set of bits as one number."""
    return int.from_bytes(words.tobytes(), "little")
