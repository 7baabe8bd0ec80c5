"""Inner loop of a demand replay in plain Python: the meaning of each policy, and the oracle of `_replay.c`.

It runs where moeflow was installed without a compiler.

Knows nothing of traces: rows of expert numbers in, hits out.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from moeflow.random_bits import RandomBits

_NEVER = 2**31 - 1


class ReplayCache:
    """Slots of a replay: no copies in flight, so an expert is resident or it is not.

    A slot that the present event has touched is not evicted. Frequencies outlive an eviction; ages count the passes of
    the expert's own layer, as in `moeflow.policy.cache`.

    Args:
        num_layers: L.
        num_slots: how many experts fit.
        policy: a name in `SCORES`, or "random".
        num_fixed: slots that the static policy never empties.
        popularity: [L, E], uses of each expert in all that is replayed.
        seed: of the random policy.
    """

    def __init__(
        self, num_layers: int, num_slots: int, policy: str, *, num_fixed: int, popularity: np.ndarray, seed: int
    ) -> None:
        self.num_layers, self.num_slots, self.policy, self.num_fixed = num_layers, num_slots, policy, num_fixed
        self.popularity = popularity
        self._random = RandomBits(seed)
        self.empty()

    def empty(self) -> None:
        """Forget everything but the state of the random numbers."""
        self.clock = 0  # one tick an expert demanded
        self.passes = [0] * self.num_layers
        self.uses: dict[tuple[int, int], int] = {}
        self.key_of: list[tuple[int, int]] = []  # of each used slot: (layer, expert)
        self.slot_of: dict[tuple[int, int], int] = {}
        self.last_touch = [0] * self.num_slots
        self.last_pass = [0] * self.num_slots
        self.next_row = [_NEVER] * self.num_slots

    def run_event(self, layer: int, experts: list[int], next_rows: list[int]) -> int:
        """Demand distinct experts of one layer for one token.

        Args:
            layer: the layer.
            experts: in the order in which they are touched.
            next_rows: the next row that demands each.

        Returns:
            How many were resident when the event began.
        """
        event_begin = self.clock + 1
        self.passes[layer] += 1
        demands = []  # (key, clock of its touch, its next row)
        for expert, next_row in zip(experts, next_rows, strict=True):
            self.clock += 1
            key = (layer, expert)
            self.uses[key] = self.uses.get(key, 0) + 1
            demands.append((key, self.clock, next_row))
        misses = [demand for demand in demands if demand[0] not in self.slot_of]
        for key, touch, next_row in demands:
            if key in self.slot_of:
                self._enter(self.slot_of[key], key, touch, next_row)
        for key, touch, next_row in misses:
            if len(self.key_of) < self.num_slots:
                slot = len(self.key_of)
                self.key_of.append(key)
            else:
                slot = self._victim(event_begin)
                del self.slot_of[self.key_of[slot]]
            self.key_of[slot] = key
            self.slot_of[key] = slot
            self._enter(slot, key, touch, next_row)
        return len(experts) - len(misses)

    def _enter(self, slot: int, key: tuple[int, int], touch: int, next_row: int) -> None:
        self.last_touch[slot], self.last_pass[slot], self.next_row[slot] = touch, self.passes[key[0]], next_row

    def _victim(self, event_begin: int) -> int:
        if self.policy == "random":
            while True:
                slot = self._random.next() % len(self.key_of)
                if self.last_touch[slot] < event_begin:
                    return slot
        score, last_touch = SCORES[self.policy], self.last_touch
        evictable = [slot for slot in range(len(self.key_of)) if last_touch[slot] < event_begin]
        return min(evictable, key=lambda slot: (score(self, slot), last_touch[slot]))


def _lfru(cache: ReplayCache, slot: int) -> float:
    key = cache.key_of[slot]
    age = cache.passes[key[0]] - cache.last_pass[slot]
    # Among equals the most recent is evicted: its layer is the last to run again.
    return cache.uses[key] / (age + 1) - 1e-12 * cache.last_touch[slot]


# Each policy maps a slot to a score; the lowest is evicted, among equals the least recently used.
# lfu: among equals the lowest layer and expert number is evicted, as in the reference figures for gpt-oss-20b; the live
# cache evicts the least recent there and hits up to half a percent more.
# static: the first experts to arrive stay, the others are evicted by age.
# popularity: the experts that all the replayed rows demand most stay, a static hot set chosen with hindsight.
# belady: the expert whose next use is farthest is evicted, always in favour of the one demanded (Source: L. A. Belady,
# A study of replacement algorithms for a virtual-storage computer, 1966).
SCORES: dict[str, Callable[[ReplayCache, int], float | tuple]] = {
    "lru": lambda cache, slot: cache.last_touch[slot],
    "lfu": lambda cache, slot: (cache.uses[cache.key_of[slot]], cache.key_of[slot]),
    "lfru": _lfru,
    "static": lambda cache, slot: 1e300 if slot < cache.num_fixed else cache.last_touch[slot],
    "popularity": lambda cache, slot: cache.popularity[cache.key_of[slot]],
    "belady": lambda cache, slot: -(cache.next_row[slot] * cache.num_layers + cache.key_of[slot][0]),
}


def replay_loop(
    experts: np.ndarray,
    num_experts: int,
    starts: np.ndarray,
    num_slots: int,
    policy: str,
    *,
    warm: bool,
    num_fixed: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Replay one policy.

    Args:
        experts: [N, L, K], distinct within an event and in the order of touching; num_experts or more
            stand for none.
        num_experts: E.
        starts: [S + 1], rows at which sequences start, and the end of the last.
        num_slots: of one pool for all layers.
        policy: a name in `SCORES`, or "random".
        warm: whether a sequence starts with the experts that the one before it left.
        num_fixed: slots that the static policy never empties.
        seed: of the random policy.

    Returns:
        hits [L] and accesses [L].
    """
    num_layers = experts.shape[1]
    rows = experts[starts[0] : starts[-1]]
    popularity = np.zeros((num_layers, num_experts), np.int64)
    for layer in range(num_layers):
        uses = np.bincount(rows[:, layer].ravel(), minlength=num_experts)
        popularity[layer] = uses[:num_experts]
    cache = ReplayCache(num_layers, num_slots, policy, num_fixed=num_fixed, popularity=popularity, seed=seed)
    hits, accesses = np.zeros(num_layers, np.int64), np.zeros(num_layers, np.int64)
    spans = [(starts[0], starts[-1])] if warm else list(pairwise(starts))
    for begin, end in spans:
        cache.empty()
        events = [
            [[expert for expert in event if expert < num_experts] for event in row]
            for row in experts[begin:end].tolist()
        ]
        for row, next_rows in zip(events, _next_rows(events), strict=True):
            for layer, demanded in enumerate(row):
                hits[layer] += cache.run_event(layer, demanded, next_rows[layer])
                accesses[layer] += len(demanded)
    return hits, accesses


def _next_rows(events: list[list[list[int]]]) -> list[list[list[int]]]:
    """Return, for each demand of events [rows][layers][demands], the next row that demands the same expert."""
    seen: dict[tuple[int, int], int] = {}
    found = []
    for row in range(len(events) - 1, -1, -1):
        found.append([[seen.get((layer, e), _NEVER) for e in event] for layer, event in enumerate(events[row])])
        for layer, event in enumerate(events[row]):
            seen.update({(layer, expert): row for expert in event})
    return found[::-1]
