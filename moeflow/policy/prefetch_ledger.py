"""Ledger of prefetches: the outcome of each, the seconds saved and lost, and where prefetching is switched off.

One set of counters for replay and live. Knows numbers only.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moeflow.core import ExpertKey
from moeflow.policy.demand import Demand

_COUNTED = ("issued", "in_time", "late", "mispredicted", "wasted", "dropped", "saved_s", "cost_s")  # [L, D] each
_DECAY_PER_STEP = 0.98  # of the recent sums
_MIN_LOSS_COPIES = 0.1  # lost by each recent prefetch: a smaller loss counts as even
_MIN_TRIED = 6.0  # recent prefetches, before a layer and distance is judged
_MIN_HOLD_STEPS, _MAX_HOLD_STEPS = 64, 4096  # that a loser is switched off, doubled each time it loses again


class PrefetchLedger:
    """Counts the outcomes of prefetches by layer and distance, with the seconds saved and lost.

    A prefetch is in time when its expert is resident as its layer demands it, late when the layer has to wait for the
    copy, mispredicted when its layer passes without demanding it, wasted when it is evicted before it was used.
    It saves the copy that the demand would have waited for (a late one, half of it). It costs half a copy when a
    demanded copy shares the link with it, and a copy when the expert it evicted is demanded.

    Args:
        num_layers: L.
        num_distances: D; larger distances count as D.
        expert_bytes: bytes of one expert.
    """

    def __init__(self, num_layers: int, num_distances: int = 8, expert_bytes: int = 0) -> None:
        self.num_distances = num_distances
        self.expert_bytes = expert_bytes
        shape = self._shape = (num_layers, num_distances)
        self.reset()
        self._recent_net_s, self._recent_issued = np.zeros(shape), np.zeros(shape)
        self._off_steps, self._hold = np.zeros(shape, np.int64), np.full(shape, _MIN_HOLD_STEPS)
        self._copy_s = 0.0
        self._pending: dict[ExpertKey, tuple[int, int]] = {}  # place of the prefetch, until its layer has passed
        self._unused: dict[ExpertKey, tuple[int, int]] = {}  # mispredicted, still resident
        self._by_layer: dict[int, set[ExpertKey]] = {}
        self._evicted: dict[ExpertKey, tuple[int, int]] = {}  # experts that a prefetch evicted, with its place

    def reset(self) -> None:
        """Reset the counters; pending prefetches stay."""
        self.issued, self.in_time, self.late, self.mispredicted, self.wasted, self.dropped = (
            np.zeros(self._shape, np.int64) for _ in range(6)
        )
        self.saved_s, self.cost_s = np.zeros(self._shape), np.zeros(self._shape)
        self.net_s = 0.0  # saved less cost
        self.missed = 0  # demands that no prefetch had covered

    def start(self, key: ExpertKey, distance: int, evicted: list[ExpertKey]) -> None:
        """Enter a prefetch that was started, and the experts it evicted."""
        place = (key.layer, min(distance, self.num_distances) - 1)
        self.issued[place] += 1
        self._recent_issued[place] += 1
        self._pending[key] = place
        self._by_layer.setdefault(key.layer, set()).add(key)
        self._evicted.pop(key, None)
        for gone in evicted:
            self._evicted[gone] = place
            self.evict(gone)

    def evict(self, key: ExpertKey) -> None:
        """Enter the eviction of an expert, for whatever reason."""
        place = self._pending.pop(key, None) or self._unused.pop(key, None)
        if place is not None:
            self._by_layer[key.layer].discard(key)
            self.wasted[place] += 1

    def drop(self, key: ExpertKey) -> None:
        """Enter a copy that was taken back before it began, or failed, if it was a prefetch."""
        place = self._pending.pop(key, None) or self._unused.pop(key, None)
        if place is not None:
            self._by_layer[key.layer].discard(key)
            self.dropped[place] += 1

    def record_demand(self, demand: Demand) -> None:
        """Enter a layer's demand, each expert by where it was found."""
        layer, copy_s = demand.layer, demand.copy_s
        self._copy_s = copy_s
        for key in demand.resident:
            place = self._pending.pop(key, None) or self._unused.pop(key, None)
            if place is not None:
                self._by_layer[layer].discard(key)
                self.in_time[place] += 1
                self._account(place, copy_s)
        for key in demand.in_flight:
            place = self._pending.pop(key, None) or self._unused.pop(key, None)
            if place is not None:
                self._by_layer[layer].discard(key)
                self.late[place] += 1
                self._account(place, copy_s / 2)
        self.missed += len(demand.absent)
        for key in demand.absent:
            place = self._evicted.pop(key, None)
            if place is not None:
                self._account(place, -copy_s)
        if demand.absent:
            for key in demand.others_in_flight:
                place = self._pending.get(key) or self._unused.get(key)
                if place is not None:
                    self._account(place, -copy_s / 2)
        for key in [key for key in self._by_layer.get(layer, ()) if key in self._pending]:
            place = self._unused[key] = self._pending.pop(key)
            self.mispredicted[place] += 1

    def allowed(self, layer: int, distance: int) -> bool:
        """Whether prefetches for this layer from this distance are on; they are switched off while they lose."""
        return not self._off_steps[layer, min(distance, self.num_distances) - 1]

    def decay(self) -> None:
        """Decay the recent sums, switch off losers, and retry those that were off long enough; once a step."""
        self._recent_net_s *= _DECAY_PER_STEP
        self._recent_issued *= _DECAY_PER_STEP
        self._off_steps -= self._off_steps > 0
        tried = self._recent_issued >= _MIN_TRIED
        losing = tried & (self._recent_net_s < -_MIN_LOSS_COPIES * self._copy_s * self._recent_issued)
        self._hold[tried & ~losing] = _MIN_HOLD_STEPS
        if losing.any():
            self._off_steps[losing] = self._hold[losing]
            self._hold[losing] = np.minimum(2 * self._hold[losing], _MAX_HOLD_STEPS)
            self._recent_net_s[losing] = self._recent_issued[losing] = 0  # the next trial is judged by itself

    def clear(self) -> None:
        """Forget pending prefetches, as after everything was evicted; the counts stay."""
        for entries in (self._pending, self._unused, self._by_layer, self._evicted):
            entries.clear()

    def counts(self) -> "PrefetchCounts":
        """Return a copy of the counts, which later passes do not change."""
        return PrefetchCounts(
            **{name: getattr(self, name).copy() for name in _COUNTED},
            missed=self.missed,
            losing=int((self._off_steps > 0).sum()),
            expert_bytes=self.expert_bytes,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the counts by distance and in all; see `PrefetchCounts.as_dict`."""
        return self.counts().as_dict()

    def _account(self, place: tuple[int, int], seconds: float) -> None:
        if seconds >= 0:
            self.saved_s[place] += seconds
        else:
            self.cost_s[place] -= seconds
        self._recent_net_s[place] += seconds
        self.net_s += seconds


@dataclass(frozen=True, eq=False)
class PrefetchCounts:
    """What a ledger had counted at one time; the difference of two is what was counted between them.

    Args:
        issued, in_time, late, mispredicted, wasted, dropped: [L, D] prefetches; see `PrefetchLedger`.
        saved_s: [L, D] seconds.
        cost_s: [L, D] seconds.
        missed: demands that no prefetch had covered.
        losing: (layer, distance) pairs that are switched off now.
        expert_bytes: bytes of one expert.
    """

    issued: np.ndarray
    in_time: np.ndarray
    late: np.ndarray
    mispredicted: np.ndarray
    wasted: np.ndarray
    dropped: np.ndarray
    saved_s: np.ndarray
    cost_s: np.ndarray
    missed: int
    losing: int
    expert_bytes: int

    def __sub__(self, before: "PrefetchCounts") -> "PrefetchCounts":
        """Return what was counted since `before`; what is switched off is as it is now."""
        counted = {name: getattr(self, name) - getattr(before, name) for name in (*_COUNTED, "missed")}
        return replace(self, **counted)

    def as_dict(self) -> dict:
        """Return the counts by distance and in all, with precision and timeliness (None where nothing was issued)."""
        total = self._row(slice(None))
        total["recall_of_misses"] = _ratio(
            total["in_time"] + total["late"], total["in_time"] + total["late"] + self.missed
        )
        num_distances = self.issued.shape[1]
        total["by_distance"] = [{"distance": d + 1, **self._row(d)} for d in range(num_distances)]
        total["losing"] = self.losing
        return total

    def _row(self, distance: int | slice) -> dict:
        names = ("issued", "in_time", "late", "mispredicted", "wasted", "dropped")
        row: dict = {name: int(getattr(self, name)[:, distance].sum()) for name in names}
        row["saved_s"], row["cost_s"] = float(self.saved_s[:, distance].sum()), float(self.cost_s[:, distance].sum())
        row["wasted_bytes"] = row["wasted"] * self.expert_bytes
        used = row["in_time"] + row["late"]
        row["precision"] = _ratio(used, used + row["mispredicted"])
        row["timeliness"] = _ratio(row["in_time"], used)
        return row


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
