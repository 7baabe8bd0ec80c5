"""Best known order of copies for one sequence, and a lower bound on the time of every order.

Knows a sequence's demands and a link. Knows nothing of predictors or of a prefetcher.
"""

import heapq

import numpy as np

from moeflow.replay.link import LinkModel


def least_time_s(num_tokens: int, num_layers: int, belady_misses: int, link: LinkModel) -> float:
    """Return a lower bound in seconds on every order of copies: all the compute, or all the copies that Belady needs.

    Args:
        num_tokens: of one sequence, which starts cold.
        num_layers: L.
        belady_misses: of that sequence on demand, the fewest copies there can be.
        link: the machine.
    """
    compute_s = num_tokens * num_layers * link.layer_s
    return max(compute_s, belady_misses * link.copy_s + link.layer_s)


def replay_best_order(experts: np.ndarray, num_experts: int, num_slots: int, link: LinkModel) -> dict:
    """Replay one sequence with the best order of copies known, from a cold cache.

    The link is never idle while a copy is worth it: it fetches the next expert that is demanded and absent, in place of
    the one demanded last, unless that is demanded sooner. It takes at most 1 + F / slots times the best order, F the
    demands during one copy.

    Source: Cao, Felten, Karlin and Li (1995), "aggressive" prefetching.

    Args:
        experts: [T, L, K]; num_experts or more stand for none.
        num_experts: E.
        num_slots: experts that fit.
        link: the machine; its in-flight limit does not count.

    Returns:
        seconds, accesses, hits (resident when their layer began), late (on their way then), misses and copies.
    """
    events = [
        [layer * num_experts + expert for expert in demanded if expert < num_experts]
        for layers in experts.tolist()
        for layer, demanded in enumerate(layers)
    ]
    return _BestOrder(events, num_slots, link).run()


class _BestOrder:
    """One sequence's demands, [events][keys] with an event a layer of a token, and the link that serves them."""

    def __init__(self, events: list[list[int]], num_slots: int, link: LinkModel) -> None:
        self._events, self._link = events, link
        self._num_free = num_slots
        self._link_free_s = 0.0
        self._uses: dict[int, list[int]] = {}  # of each key, the events that demand it, the next one last
        for place in range(len(events) - 1, -1, -1):
            for key in events[place]:
                self._uses.setdefault(key, []).append(place)
        self._arrival_s: dict[int, float] = {}  # of the keys that have a slot
        self._farthest: list[tuple[int, int]] = []  # heap of (-next use, key) of those; some entries are out of date
        self._cursor = 0  # the first event that may lack something
        self._copies = 0

    def run(self) -> dict:
        """Go through all events."""
        now_s, arrival_s, found = 0.0, self._arrival_s, {"hits": 0, "late": 0, "misses": 0}
        for place, event in enumerate(self._events):
            for key in event:
                arrived = "misses" if key not in arrival_s else "hits" if arrival_s[key] <= now_s else "late"
                found[arrived] += 1
            while any(key not in arrival_s for key in event):
                assert self._fetch(place, now_s), "a layer's experts do not fit"
            end_s = max([now_s, *(arrival_s[key] for key in event)]) + self._link.layer_s
            while self._link_free_s < end_s and self._fetch(place, now_s):
                pass
            now_s = end_s
            for key in event:
                self._uses[key].pop()
                heapq.heappush(self._farthest, (-self._next_use(key), key))
        return {"seconds": now_s, "accesses": sum(found.values()), **found, "copies": self._copies}

    def _fetch(self, place: int, since_s: float) -> bool:
        """Begin one copy while the event at `place`, begun at since_s, waits or computes; False if no copy helps."""
        absent = self._next_absent(place)
        if absent is None:
            return False
        event, key = absent
        if self._num_free:
            self._num_free -= 1
        else:
            victim = self._victim(event)
            if victim is None:
                return False
            del self._arrival_s[victim]
        self._link_free_s = max(self._link_free_s, since_s) + self._link.copy_s
        self._arrival_s[key] = self._link_free_s
        heapq.heappush(self._farthest, (-self._next_use(key), key))
        self._copies += 1
        return True

    def _next_absent(self, place: int) -> tuple[int, int] | None:
        """Return the first event that lacks a key, and the key."""
        for event in range(max(self._cursor, place), len(self._events)):
            self._cursor = event
            for key in self._events[event]:
                if key not in self._arrival_s:
                    return event, key
        return None

    def _victim(self, event: int) -> int | None:
        """Return the key with the farthest next use, if that lies behind `event`."""
        heap = self._farthest
        while heap and (heap[0][1] not in self._arrival_s or -heap[0][0] != self._next_use(heap[0][1])):
            heapq.heappop(heap)
        return heap[0][1] if heap and -heap[0][0] > event else None

    def _next_use(self, key: int) -> int:
        uses = self._uses[key]
        return uses[-1] if uses else len(self._events)
