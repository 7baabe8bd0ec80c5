"""ExpertFlow's own regrouping: two clusters of equal size around two tokens, by how much routes agree.

Source: ExpertFlow (arXiv 2410.17954, section 4.2): K-medoids with K = 2, similarity 1 - Hamming distance / (L * E), and
halves made equal. It gives no rule for more than two groups; here each half is halved again.
"""

import numpy as np

from moeflow.errors import ConfigError


def medoid_groups(routes: np.ndarray, num_groups: int, *, rounds: int = 20) -> np.ndarray:
    """Split tokens by K-medoids.

    Args:
        routes: [tokens, L, E] bool.
        num_groups: a power of two that divides the number of tokens.
        rounds: at most, of assigning tokens and choosing medoids anew.

    Returns:
        [tokens] int32, the group of each token.

    Raises:
        ConfigError: another number of groups.
    """
    tokens = len(routes)
    if num_groups < 1 or num_groups & (num_groups - 1) or tokens % num_groups:
        raise ConfigError(f"{num_groups} groups of {tokens} tokens. K-medoids halves: give a power of two that fits.")
    flat = routes.reshape(tokens, -1).astype(np.float32)
    ones = flat.sum(axis=1)
    similarity = 1 - (ones[:, None] + ones - 2 * flat @ flat.T) / max(flat.shape[1], 1)
    groups = np.zeros(tokens, np.int32)
    parts = [np.arange(tokens)]
    while len(parts) < num_groups:
        parts = [half for part in parts for half in _halves(similarity, part, rounds)]
    for group, part in enumerate(parts):
        groups[part] = group
    return groups


def _halves(similarity, part, rounds):
    """Return two halves of equal size; the first medoids are the two tokens that agree least."""
    within = similarity[np.ix_(part, part)]
    medoids = np.unravel_index(within.argmin(), within.shape)
    half = len(part) // 2
    for _ in range(rounds):
        order = np.argsort(within[medoids[1]] - within[medoids[0]], kind="stable")
        first, second = order[:half], order[half:]
        new = tuple(int(group[within[np.ix_(group, group)].sum(axis=1).argmax()]) for group in (first, second))
        if new == medoids:
            break
        medoids = new
    return part[np.sort(first)], part[np.sort(second)]
