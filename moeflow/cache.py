"""Which expert sits in which slot, and who must go when a slot is needed. Bookkeeping only: no tensors, no I/O.

A slot is free, loading (a copy into it is under way) or resident. A pinned slot is used by a running kernel or an
in-flight copy and is never evicted. This is the one residency map: it changes here and nowhere else.
"""

from collections.abc import Callable

import numpy as np

from moeflow.core import ExpertKey
from moeflow.errors import ConfigError

_FREE, _LOADING, _RESIDENT = 0, 1, 2


class ExpertCache:
    """Slots shared by all layers, under one eviction policy.

    Frequencies outlive an eviction: an expert that comes back is not a stranger. Ages count the passes of the expert's
    own layer, because tokens walk the layers in order: by any common clock the layers that come next look oldest.

    Args:
        num_slots: how many experts fit.
        policy: a name in `POLICIES`.
        num_transient: slots the static policy keeps for experts outside its fixed set.
    """

    def __init__(self, num_slots: int, policy: str = "lfru", *, num_transient: int = 1):
        if policy not in POLICIES:
            raise ConfigError(f"policy {policy!r} is unknown. Allowed: {', '.join(POLICIES)}.")
        if num_slots < 1:
            raise ConfigError(f"a cache of {num_slots} slots holds nothing. Give at least 1.")
        self.num_slots = num_slots
        self.limit = num_slots  # how many of the slots may be used at present
        self.policy = policy
        self.evictions = 0
        self.peak_used = 0
        self.num_transient = num_transient
        self._victim_scores: Callable = POLICIES[policy]
        self._slot_of: dict[ExpertKey, int] = {}
        self._key_of: list[ExpertKey | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._state = np.zeros(num_slots, np.int8)
        self._pins = np.zeros(num_slots, np.int32)
        self._count: dict[ExpertKey, int] = {}
        self._last_event: dict[ExpertKey, int] = {}
        self._event = 0
        self._passes: dict[int, int] = {}  # of each layer
        # Mirrors of the dicts above for the expert in each slot, so that a victim is found without a Python loop.
        self.frequency = np.zeros(num_slots)
        self.last_pass = np.zeros(num_slots)
        self.last_event = np.zeros(num_slots)
        self.layer = np.zeros(num_slots, np.int64)

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, key: ExpertKey) -> bool:
        return self.lookup(key) is not None

    def lookup(self, key: ExpertKey) -> int | None:
        """Return the slot of a resident expert, or None (absent or still loading)."""
        slot = self._slot_of.get(key)
        return slot if slot is not None and self._state[slot] == _RESIDENT else None

    def touch(self, keys: list[ExpertKey]) -> None:
        """Record that these experts are demanded by one pass of their layer, whether resident or not."""
        if not keys:
            return
        layer = keys[0].layer
        now = self._passes[layer] = self._passes.get(layer, 0) + 1
        for key in keys:
            self._event += 1
            count = self._count[key] = self._count.get(key, 0) + 1
            self._last_event[key] = self._event
            slot = self._slot_of.get(key)
            if slot is not None:
                self.frequency[slot], self.last_pass[slot], self.last_event[slot] = count, now, self._event

    def ages(self) -> np.ndarray:
        """Return, for each slot, how many passes of its expert's layer went by since its last use: [num_slots]."""
        passes = np.zeros(max(self._passes, default=0) + 1)
        passes[list(self._passes)] = list(self._passes.values())
        return passes[self.layer] - self.last_pass

    def reserve(self, key: ExpertKey) -> int | None:
        """Give an absent expert a slot, evicting by policy, and mark it loading with one pin.

        Returns:
            The slot, or None when every slot is pinned. A locked slot cannot be evicted.
        """
        assert key not in self._slot_of, f"{key} has a slot already"
        if self._free and len(self._slot_of) < self.limit:
            slot = self._free.pop()
        else:
            slot = self._victim()
            if slot is None:
                return None
            del self._slot_of[self._key_of[slot]]
            self.evictions += 1
        self._slot_of[key], self._key_of[slot] = slot, key
        self._state[slot], self._pins[slot] = _LOADING, 1
        self.frequency[slot] = self._count.get(key, 0)
        self.last_pass[slot], self.last_event[slot] = self._passes.get(key.layer, 0), self._last_event.get(key, 0)
        self.layer[slot] = key.layer
        self.peak_used = max(self.peak_used, len(self._slot_of))
        return slot

    def commit(self, key: ExpertKey) -> int:
        """Say that a copy has arrived: the expert is resident. The pin of `reserve` stays with the caller."""
        slot = self._slot_of[key]
        assert self._state[slot] == _LOADING, f"{key} is not loading"
        self._state[slot] = _RESIDENT
        return slot

    def abort(self, key: ExpertKey) -> None:
        """Say that a copy failed: the slot is free again, whatever pins it had."""
        slot = self._slot_of[key]
        assert self._state[slot] == _LOADING, f"{key} is not loading"
        self._release(slot)

    def slot(self, key: ExpertKey) -> int:
        """Return the slot of an expert that has one, resident or loading."""
        return self._slot_of[key]

    @property
    def num_pinned(self) -> int:
        """How many slots are pinned."""
        return int((self._pins > 0).sum())

    def set_limit(self, limit: int) -> list[int]:
        """Allow `limit` slots from now on, evicting by policy what is over it and not pinned.

        Returns:
            The slots that became free.
        """
        self.limit = max(1, min(limit, self.num_slots))
        freed = []
        while len(self._slot_of) > self.limit and (slot := self._victim()) is not None:
            self._release(slot)
            self.evictions += 1
            freed.append(slot)
        return freed

    def pin(self, key: ExpertKey) -> int:
        """Keep a resident expert where it is until `unpin`; pins count. Returns its slot."""
        slot = self._slot_of[key]
        assert self._state[slot] == _RESIDENT, f"{key} is still loading"
        self._pins[slot] += 1
        return slot

    def unpin(self, key: ExpertKey) -> None:
        """Take one pin away."""
        slot = self._slot_of[key]
        assert self._pins[slot] > 0, f"{key} is not pinned"
        self._pins[slot] -= 1

    def resident(self) -> list[ExpertKey]:
        """List the resident experts."""
        return [key for key, slot in self._slot_of.items() if self._state[slot] == _RESIDENT]

    def check_integrity(self) -> None:
        """Assert the invariants: one slot an expert, states and pins agree, nothing is lost."""
        for key, slot in self._slot_of.items():
            assert self._key_of[slot] == key, f"slot {slot} holds {self._key_of[slot]}, the map says {key}"
            assert self._state[slot] != _FREE, f"{key} sits in a free slot"
            assert self._state[slot] == _RESIDENT or self._pins[slot] > 0, f"{key} is loading without a pin"
        assert len(set(self._slot_of.values())) == len(self._slot_of), "two experts share a slot"
        assert sorted([*self._free, *self._slot_of.values()]) == list(range(self.num_slots)), "a slot is lost"
        for slot in self._free:
            empty = self._key_of[slot] is None and self._state[slot] == _FREE and self._pins[slot] == 0
            assert empty, f"free slot {slot} is not empty"
        assert (self._pins >= 0).all(), "a pin count is negative"
        for key, slot in self._slot_of.items():
            assert self.frequency[slot] == self._count.get(key, 0), f"frequency of {key} is stale"

    def clear(self) -> None:
        """Forget every resident and loading expert; the counts stay."""
        self._slot_of.clear()
        self._key_of[:] = [None] * self.num_slots
        self._free[:] = range(self.num_slots - 1, -1, -1)
        self._state[:], self._pins[:] = _FREE, 0

    def _victim(self) -> int | None:
        evictable = (self._pins == 0) & (self._state == _RESIDENT)
        if not evictable.any():
            return None
        # What still ties goes by the least recent event, so the order never depends on slot numbers.
        scores = np.where(evictable, self._victim_scores(self), np.inf)
        lowest = np.flatnonzero(scores == scores.min())
        return int(lowest[np.argmin(self.last_event[lowest])])

    def _release(self, slot: int) -> None:
        del self._slot_of[self._key_of[slot]]
        self._key_of[slot] = None
        self._state[slot], self._pins[slot] = _FREE, 0
        self._free.append(slot)


def _lru(cache: ExpertCache) -> np.ndarray:
    return cache.last_event


def _lfu(cache: ExpertCache) -> np.ndarray:
    return cache.frequency


def _lfru(cache: ExpertCache) -> np.ndarray:
    # Among equals the most recent goes: its layer is the last to run again.
    return cache.frequency / (cache.ages() + 1) - 1e-12 * cache.last_event


def _static(cache: ExpertCache) -> np.ndarray:
    """The first experts to arrive stay for good; the rest share the transient slots by age."""
    fixed = np.arange(cache.num_slots) < cache.limit - cache.num_transient
    return np.where(fixed, 1e300, cache.last_event)


# Each policy maps a cache to [num_slots] scores; the lowest evictable score is evicted.
# lfru: frequency / (age + 1), arXiv 2608.07911.
POLICIES: dict[str, Callable[[ExpertCache], np.ndarray]] = {"lru": _lru, "lfu": _lfu, "lfru": _lfru, "static": _static}
