"""Which expert sits in which slot, and which is evicted when a slot is needed.

The one residency map. A slot is free, loading (a copy into it is under way) or resident. A pinned slot is used by a
running kernel or an in-flight copy and is never evicted. Bookkeeping only: `offload.residency` decides which copy
starts, and when. Knows nothing of tensors or I/O.
"""

from collections.abc import Iterable

import numpy as np

from moeflow.core import ExpertKey
from moeflow.errors import ConfigError
from moeflow.policy.eviction import POLICIES
from moeflow.policy.forecast import Forecast

_FREE, _LOADING, _RESIDENT = 0, 1, 2


class ExpertCache:
    """Slots shared by all layers, under one eviction policy.

    Frequencies outlive an eviction: an expert that comes back is not a stranger. Ages count the passes of the expert's
    own layer, because tokens walk the layers in order: by any common clock the layers that come next look oldest.

    Args:
        num_slots: how many experts fit at most.
        policy: a name in `POLICIES`.
        num_transient: slots the static policy keeps for experts outside its fixed set.
        sizes: [num_layers][num_experts], units of the limit that each expert takes, where experts differ in size and a
            slot takes no more memory than its expert; one each when None.
    """

    def __init__(
        self, num_slots: int, policy: str = "lfru", *, num_transient: int = 1, sizes: list[list[int]] | None = None
    ) -> None:
        if policy not in POLICIES:
            raise ConfigError(f"policy {policy!r} is unknown. Allowed: {', '.join(POLICIES)}.")
        if num_slots < 1:
            raise ConfigError(f"a cache of {num_slots} slots holds nothing. Give at least 1.")
        self.num_slots = num_slots
        # Units allowed at present, and units in use: slots, or the sizes of the experts in them.
        self.limit = num_slots if sizes is None else num_slots * max(map(max, sizes))
        self.used = 0
        self.forecast: Forecast | None = None  # kept up to date by the prefetcher; None while nothing is predicted
        self.policy = policy
        self.evictions = 0
        self.evicted: list[ExpertKey] = []  # by the last reserve()
        self.moved: set[ExpertKey] = set()  # came to be resident, or ceased to; `ResidentTable` takes them out
        self._emptied: set[int] = set()
        self._closed: set[int] = set()  # slots without memory, which are handed out to nobody
        self.peak_used = 0
        self.num_transient = num_transient
        self._victim_scores = POLICIES[policy]
        self.sizes = sizes
        self._slot_of: dict[ExpertKey, int] = {}
        self._key_of: list[ExpertKey | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._state = np.zeros(num_slots, np.int8)
        self._pins = np.zeros(num_slots, np.int32)
        self._event = 0
        # Of every expert, resident or not, [num_layers, num_experts]; they grow as larger numbers appear.
        self._counts, self._last_passes, self._last_events = (np.zeros((1, 1), np.int64) for _ in range(3))
        self._passes = np.zeros(1, np.int64)  # of each layer
        self._layer = np.zeros(num_slots, np.int64)  # of the expert in each slot
        self._expert = np.zeros(num_slots, np.int64)
        self._blocked = np.full(num_slots, np.inf)  # infinite where a slot may not be evicted, else 0
        self._present = np.zeros((1, 1), bool)  # of every expert, whether it has a slot
        self._resident = np.full((1, 1), -1, np.int64)  # of every expert, its slot where it is resident, else -1

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, key: ExpertKey) -> bool:
        return self.lookup(key) is not None

    def lookup(self, key: ExpertKey) -> int | None:
        """Return the slot of a resident expert, or None (absent or still loading)."""
        slot = self._slot_of.get(key)
        return slot if slot is not None and self._state[slot] == _RESIDENT else None

    @property
    def slots(self) -> dict[ExpertKey, int]:
        """The slot of every expert that has one, resident or loading; not to be changed."""
        return self._slot_of

    def touch(self, keys: list[ExpertKey]) -> None:
        """Record that these experts are demanded by one pass of their layer, whether resident or not."""
        if not keys:
            return
        layer, experts = keys[0].layer, [key.expert for key in keys]
        self._grow(layer, max(experts))
        self._passes[layer] += 1
        counts, passes, events = self._counts[layer], self._last_passes[layer], self._last_events[layer]
        now = self._passes[layer]
        for expert in experts:
            self._event += 1
            counts[expert] += 1
            passes[expert], events[expert] = now, self._event

    def touch_layers(self, layers: np.ndarray, experts: np.ndarray) -> None:
        """Record the same of a pass of each of some layers [N], all different, and of its experts [N, K], or none."""
        self._grow(int(layers.max()), int(experts.max(initial=0)))
        self._passes[layers] += 1
        demanded = layers[:, None], experts
        self._counts[demanded] += 1
        self._last_passes[demanded] = self._passes[layers][:, None]
        self._last_events[demanded] = self._event + 1 + np.arange(experts.size).reshape(experts.shape)
        self._event += experts.size

    @property
    def frequency(self) -> np.ndarray:
        """How often the expert in each slot was demanded: [num_slots]."""
        return self._counts[self._layer, self._expert]

    def uses(self, key: ExpertKey) -> int:
        """Return how often an expert was demanded, resident or not."""
        self._grow(*key)
        return int(self._counts[key])

    @property
    def last_event(self) -> np.ndarray:
        """When the expert in each slot was last demanded, as a number that grows with every demand: [num_slots]."""
        return self._last_events[self._layer, self._expert]

    def ages(self) -> np.ndarray:
        """Return, for each slot, how many passes of its expert's layer went by since its last use: [num_slots]."""
        return self._passes[self._layer] - self._last_passes[self._layer, self._expert]

    def usual_rate(self, num_layers: int, num_experts: int) -> np.ndarray:
        """Return how likely each expert is demanded in one pass of its layer, by lfru's score: [L, E].

        That score is frequency / (age + 1), here in uses a pass.
        """
        self._grow(num_layers - 1, num_experts - 1)
        passes = self._passes[:num_layers, None]
        ages = passes - self._last_passes[:num_layers, :num_experts]
        return self._counts[:num_layers, :num_experts] / ((passes + 1) * (ages + 1))

    def reserve(self, key: ExpertKey, *, worth: float | None = None) -> int | None:
        """Give an absent expert a slot, evicting by policy, and mark it loading with one pin.

        Args:
            key: the expert.
            worth: of a slot for the expert, by the forecast. Where it is given, no expert that is worth as much is
                evicted.

        Returns:
            The slot, or None when no slot may be taken. A pinned slot cannot be evicted.
        """
        assert key not in self._slot_of, f"{key} has a slot already"
        self.evicted, size = [], self.size(key)
        while not self._free or self.used + size > self.limit:
            slot = self._victim()
            if slot is None:
                return None
            if worth is not None:
                assert self.forecast is not None, "a worth was given, and there is no forecast"
                if self.forecast.worth[self._layer[slot], self._expert[slot]] >= worth:
                    return None
            self.evicted.append(self._release(slot))
            self.evictions += 1
            self._emptied.add(slot)
        slot = self._free.pop()  # the one emptied last
        self._emptied.discard(slot)
        self.used += size
        self._slot_of[key], self._key_of[slot] = slot, key
        self._state[slot], self._pins[slot], self._blocked[slot] = _LOADING, 1, np.inf
        self._grow(*key)
        self._present[key] = True
        self._layer[slot], self._expert[slot] = key
        self.peak_used = max(self.peak_used, self.used)
        return slot

    def commit(self, key: ExpertKey) -> int:
        """Make a loading expert resident: its copy has arrived. The pin of `reserve` stays with the caller."""
        slot = self._slot_of[key]
        assert self._state[slot] == _LOADING, f"{key} is not loading"
        self.moved.add(key)
        self._state[slot] = _RESIDENT
        self._resident[key] = slot
        return slot

    def abort(self, key: ExpertKey) -> None:
        """Free the slot of a loading expert, whatever pins it had: its copy failed or was taken back."""
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

    def take_emptied(self) -> list[int]:
        """Return the slots that evictions have left empty since the last call."""
        found = list(self._emptied)
        self._emptied.clear()
        return found

    def set_limit(self, limit: int) -> list[int]:
        """Allow `limit` units from now on, evicting by policy until no more are in use, pinned slots apart.

        Returns:
            The slots that became free.
        """
        self.limit = max(1, limit if self.sizes is not None else min(limit, self.num_slots))
        freed = []
        while self.used > self.limit and (slot := self._victim()) is not None:
            self._release(slot)
            self.evictions += 1
            freed.append(slot)
        return freed

    def close(self, slots: Iterable[int]) -> bool:
        """Evict the experts in these slots, and hand the slots out no more; do nothing where one of them is pinned.

        Returns:
            Whether they are closed now.
        """
        closed = set(slots)
        if any(self._pins[slot] for slot in closed):
            return False
        for slot in closed - set(self._free) - self._closed:
            self._release(slot)
            self.evictions += 1
        self._free = [slot for slot in self._free if slot not in closed]
        self._emptied -= closed
        self._closed |= closed
        return True

    def open(self, slots: Iterable[int]) -> None:
        """Hand closed slots out again."""
        opened = self._closed & set(slots)
        self._closed -= opened
        self._free += sorted(opened, reverse=True)

    def uses_in(self, slots: Iterable[int]) -> int:
        """Return how often the experts in these slots were demanded, all together."""
        return sum(self.uses(key) for slot in slots if (key := self._key_of[slot]) is not None)

    def has_room_for(self, num_experts: int) -> bool:
        """Whether so many experts, which are all that there are, have room at once."""
        units = num_experts if self.sizes is None else sum(map(sum, self.sizes))
        return units <= self.limit and num_experts <= self.num_slots

    def size(self, key: ExpertKey) -> int:
        """Return how many units of the limit an expert takes."""
        return 1 if self.sizes is None else self.sizes[key.layer][key.expert]

    def pin(self, key: ExpertKey) -> int:
        """Keep a resident expert where it is until `unpin`; pins count. Returns its slot."""
        slot = self._slot_of[key]
        assert self._state[slot] == _RESIDENT, f"{key} is still loading"
        self._pins[slot] += 1
        self._blocked[slot] = np.inf
        return slot

    def unpin(self, key: ExpertKey) -> None:
        """Take one pin away."""
        slot = self._slot_of[key]
        assert self._pins[slot] > 0, f"{key} is not pinned"
        self._pins[slot] -= 1
        if not self._pins[slot] and self._state[slot] == _RESIDENT:
            self._blocked[slot] = 0

    def present(self, num_layers: int, num_experts: int) -> np.ndarray:
        """Return which experts have a slot, resident or loading: bool [num_layers, num_experts], not to be changed."""
        self._grow(num_layers - 1, num_experts - 1)
        return self._present[:num_layers, :num_experts]

    def resident(self) -> list[ExpertKey]:
        """List the resident experts."""
        return [key for key, slot in self._slot_of.items() if self._state[slot] == _RESIDENT]

    def check_integrity(self) -> None:
        """Assert the invariants: one slot per expert, states and pins agree, no slot is lost."""
        for key, slot in self._slot_of.items():
            assert self._key_of[slot] == key, f"slot {slot} holds {self._key_of[slot]}, the map says {key}"
            assert self._state[slot] != _FREE, f"{key} sits in a free slot"
            assert self._state[slot] == _RESIDENT or self._pins[slot] > 0, f"{key} is loading without a pin"
        assert len(set(self._slot_of.values())) == len(self._slot_of), "two experts share a slot"
        held = [*self._free, *self._slot_of.values(), *self._closed]
        assert sorted(held) == list(range(self.num_slots)), "a slot is lost"
        for slot in self._free:
            empty = self._key_of[slot] is None and self._state[slot] == _FREE and self._pins[slot] == 0
            assert empty, f"free slot {slot} is not empty"
        assert (self._pins >= 0).all(), "a pin count is negative"
        free = (self._state == _RESIDENT) & (self._pins == 0)
        assert np.array_equal(free, self._blocked == 0), "a slot is barred from eviction, or open to it, by mistake"
        assert self._present.sum() == len(self._slot_of), "the map of present experts is stale"
        resident = {ExpertKey(*map(int, place)) for place in np.argwhere(self._resident >= 0)}
        assert resident == set(self.resident()), "the map of resident experts is stale"
        assert all(self._resident[key] == self._slot_of[key] for key in resident), "a resident expert is elsewhere"
        assert self.used == sum(map(self.size, self._slot_of)), "what is used does not add up"
        for key, slot in self._slot_of.items():
            assert (self._layer[slot], self._expert[slot]) == key, f"slot {slot} is not scored as {key}"

    def clear(self, closed: Iterable[int] = ()) -> None:
        """Forget every resident and loading expert, whatever an interrupt has left; the counts stay.

        Args:
            closed: the slots that are handed out to nobody.
        """
        self.moved.update(ExpertKey(*place) for place in np.ndindex(*self._resident.shape))
        self._slot_of.clear()
        self.used = 0
        self._key_of[:] = [None] * self.num_slots
        self._closed = set(closed)
        self._free[:] = [slot for slot in range(self.num_slots - 1, -1, -1) if slot not in self._closed]
        self._state[:], self._pins[:], self._blocked[:], self._present[:] = _FREE, 0, np.inf, False
        self._resident[:] = -1

    def _victim(self) -> int | None:
        scores = self._victim_scores(self) + self._blocked
        slot = int(scores.argmin())
        lowest = scores[slot]
        if lowest == np.inf:
            return None
        # What still ties goes by the least recent event, so the order never depends on slot numbers.
        ties = np.flatnonzero(scores == lowest)
        return slot if len(ties) == 1 else int(ties[self.last_event[ties].argmin()])

    def _grow(self, layer: int, expert: int) -> None:
        rows, columns = self._counts.shape
        if layer < rows and expert < columns:
            return
        more = ((0, max(layer + 1 - rows, 0)), (0, max(expert + 1 - columns, 0)))
        self._counts, self._last_passes, self._last_events, self._present = (
            np.pad(array, more) for array in (self._counts, self._last_passes, self._last_events, self._present)
        )
        self._resident = np.pad(self._resident, more, constant_values=-1)
        self._passes = np.pad(self._passes, more[0])

    def _release(self, slot: int) -> ExpertKey:
        """Free a slot; return the expert that sat in it."""
        key, self._key_of[slot] = self._key_of[slot], None
        assert key is not None, f"slot {slot} is free already"
        self.moved.add(key)
        self.used -= self.size(key)
        del self._slot_of[key]
        self._present[key], self._resident[key] = False, -1
        self._state[slot], self._pins[slot], self._blocked[slot] = _FREE, 0, np.inf
        self._free.append(slot)
        return key
