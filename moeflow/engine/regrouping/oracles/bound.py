"""Lower bound on active (layer, expert) pairs over all splits of the tokens into groups of equal size.

A pair that n tokens take, n_g of them in group g, is active in k groups. Over all ways to split n tokens, k is at least
a line in z = sum of n_g^2, the number of the pair's token couples that are together: k >= at - slope * z. So the sum of
active pairs is at least a constant less <W, X>, where X[i, j] says whether tokens i and j are together and W sums the
slopes of the pairs that both take. X has ones on its diagonal and rows that sum to the group size s, so its largest
eigenvalue is s, on the vector of ones, and its others sum to tokens - s. For any multipliers u of the diagonal, <W, X>
is at most sum(u) + s * (the value of W - diag(u) on the normed vector of ones) + (tokens - s) * its largest eigenvalue
off that vector. Subgradient steps find good multipliers; any prove a bound.

Source: eigenvalue bounds of graph partitioning, Donath and Hoffman, IBM Journal 17 (1973).
"""

import math

import numpy as np

from moeflow.errors import ConfigError

_NUM_STEPS, _NUM_EIGENVECTORS = 200, 4


def regroup_bound(routes: np.ndarray, num_groups: int, *, steps: int = _NUM_STEPS) -> int:
    """Return a lower bound on the active pairs of every split into groups of equal size.

    Args:
        routes: [tokens, L, E] bool.
        num_groups: G; divides the number of tokens.
        steps: of the search for multipliers.

    Raises:
        ConfigError: G does not divide the number of tokens.
    """
    tokens = len(routes)
    if num_groups < 1 or tokens % num_groups:
        raise ConfigError(f"{tokens} tokens in {num_groups} groups of equal size. Give a number that divides them.")
    size = tokens // max(num_groups, 1)
    taken = routes.reshape(tokens, -1)
    counts = taken.sum(axis=0)
    taken, counts = taken[:, counts > 0].astype(np.float64), counts[counts > 0]
    least = sum(-(-int(count) // size) for count in counts)  # by group size alone
    if num_groups == 1 or not len(counts):
        return least
    kinds = {int(count): _line(int(count), size, num_groups) for count in np.unique(counts)}
    at, slopes = np.array([kinds[int(count)] for count in counts]).T
    together = (taken * slopes) @ taken.T
    return max(least, math.ceil(at.sum() - _most_together(together, size, steps) - 1e-6))


def _line(count, size, num_groups) -> tuple[float, float]:
    """Return (at, slope): k groups that hold `count` tokens are at least at - slope * z, whatever the split."""
    fewest = -(-count // size)
    ks = range(fewest, min(num_groups, count) + 1)
    start = _most_couples(count, fewest, size)
    best = (float(fewest), 0.0)
    for k in ks[1:]:
        end = _fewest_couples(count, k)
        if end < start:
            slope = (k - fewest) / (start - end)
            if all(other >= fewest + slope * (start - _fewest_couples(count, other)) - 1e-9 for other in ks):
                best = (fewest + slope * start, slope)
    return best


def _fewest_couples(count, k) -> int:
    """Return the least sum of squares of k groups with `count` tokens."""
    each, more = divmod(count, k)
    return (k - more) * each**2 + more * (each + 1) ** 2


def _most_couples(count, k, size) -> int:
    """Return the largest sum of squares of k groups with `count` tokens, 1 to `size` in each."""
    left, total = count - k, 0
    for _ in range(k):
        more = min(size - 1, left)
        left -= more
        total += (1 + more) ** 2
    return total


def _most_together(together, size, steps) -> float:
    """Return the least upper bound on <together, X> that subgradient steps find."""
    tokens = len(together)
    ones = np.full((tokens, 1), tokens**-0.5)
    multipliers, best = np.zeros(tokens), float("inf")
    length = 0.4 * together.max()
    for step in range(steps):
        matrix = together - np.diag(multipliers)
        along = float((ones.T @ matrix @ ones)[0, 0])
        off = matrix - ones @ (ones.T @ matrix)
        off -= (off @ ones) @ ones.T
        values, vectors = np.linalg.eigh(off)
        # The vector of ones is an eigenvector of `off` with value 0, so the largest is never below it.
        best = min(best, float(multipliers.sum()) + size * along + (tokens - size) * max(float(values[-1]), 0.0))
        top = np.exp((values[-_NUM_EIGENVECTORS:] - values[-1]) / (0.02 * abs(values[-1]) + 1e-9))
        weights = vectors[:, -_NUM_EIGENVECTORS:] ** 2 @ (top / top.sum())
        multipliers -= length / (1 + step) ** 0.6 * (1 - size / tokens - (tokens - size) * weights)
    return best
