"""The assignment problem: N things to N places, each place once, at minimum total cost. Integral without a solver."""

import numpy as np


def assign(costs: np.ndarray) -> np.ndarray:
    """Return [N], the place of each thing; ties always give the same answer.

    Args:
        costs: [N, N] finite, cost of each thing at each place.

    Source: shortest augmenting paths, Jonker and Volgenant 1987; rows are added one after the other.
    """
    size = len(costs)
    price = np.zeros(size + 1)  # of places; a new thing enters at the last
    rent = np.zeros(size)  # of things
    thing_at = np.full(size + 1, -1)
    for thing in range(size):
        thing_at[size] = thing
        place, used = size, np.zeros(size + 1, bool)
        distance, came_from = np.full(size, np.inf), np.full(size, size)
        while thing_at[place] >= 0:
            used[place] = True
            reduced = costs[thing_at[place]] - rent[thing_at[place]] - price[:size]
            nearer = ~used[:size] & (reduced < distance)
            distance[nearer], came_from[nearer] = reduced[nearer], place
            target = int(np.where(used[:size], np.inf, distance).argmin())
            step = distance[target]
            rent[thing_at[used]] += step
            price[used] -= step
            distance[~used[:size]] -= step
            place = target
        while place != size:
            thing_at[place] = thing_at[came_from[place]]
            place = came_from[place]
    places = np.empty(size, int)
    places[thing_at[:size]] = np.arange(size)
    return places
