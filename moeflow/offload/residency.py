"""Moves experts to the device: starts copies, enters arrivals, and orders compute behind them.

The one place that moves an expert between absent, in flight and resident. The cache says which expert sits in which
slot; this module says which copy starts, and when. Knows nothing of routers, passes or arithmetic.
"""

import time
from collections import deque
from collections.abc import Iterable

from moeflow.core import ExpertKey, RecordLayout, Tier
from moeflow.errors import ExpertReadError
from moeflow.offload.arena.segmented_pool import SegmentedPool
from moeflow.offload.copies.transfer import Transfer
from moeflow.offload.slot_pool import Resident, SlotPool
from moeflow.offload.stats import Stats
from moeflow.offload.streams import Streams
from moeflow.offload.transfers import Transfers
from moeflow.policy.cache import ExpertCache
from moeflow.policy.demand import Demand
from moeflow.policy.prefetch import Prefetcher

_MAX_PREFETCHES = 2  # in flight at once: more would only delay a demanded copy
_LINK_BYTES = 16 << 20  # likewise to a GPU, where small experts do not fill the link two at a time


class Residency:
    """Moves experts to the device, on demand and ahead of it.

    Args:
        cache: which expert sits in which slot.
        pool: the slots.
        streams: the order between copies and compute.
        transfers: the copies.
        prefetcher: chooses prefetches; None for demand only.
        stats: the counters.
    """

    def __init__(
        self,
        cache: ExpertCache,
        pool: SlotPool,
        streams: Streams,
        transfers: Transfers,
        prefetcher: Prefetcher | None,
        stats: Stats,
    ) -> None:
        self.cache = cache
        self.transfers = transfers
        self.pool = pool
        self._streams = streams
        self._prefetcher = prefetcher
        self._stats = stats
        self._max_prefetches = _MAX_PREFETCHES
        if pool.device.type != "cpu":
            most = transfers.max_in_flight // 2
            self._max_prefetches = max(_MAX_PREFETCHES, min(most, -(-_LINK_BYTES // pool.stride)))
        self._ready: dict[int, object] = {}  # by slot: the end of a copy that no compute has waited for yet
        self._last_use: dict[int, object] = {}  # by slot: of compute since all slots were used
        self._last_use_of_all: object = None
        self._latest_use: object = None  # behind every use before it, whichever streams they were in

    def claim(self, layer: int, keys: list[ExpertKey]) -> Demand:
        """Claim a layer's demanded experts: pin the resident ones, put those in flight before prefetches.

        Args:
            layer: number among the MoE layers.
            keys: its demanded experts.

        Returns:
            Where each was found; `others_in_flight` is filled only in a pass that is predicted.
        """
        cache, transfers = self.cache, self.transfers
        cache.touch(keys)
        resident = [key for key in keys if cache.lookup(key) is not None]
        for key in resident:
            cache.pin(key)
        absent = [key for key in keys if key not in cache.slots]
        in_flight = [key for key in keys if key in transfers]
        for key in in_flight:
            transfers.promote(key)
        predicted = self._prefetcher is not None and self._prefetcher.active
        others = transfers.prefetches() if predicted else []
        return Demand(layer, resident, in_flight, absent, transfers.copy_s, others)

    def begin_use(self, keys: list[ExpertKey], records: list[RecordLayout]) -> list[Resident]:
        """Return where pinned experts lie, ready for compute of the calling thread; `records` are their layer's."""
        slot_of = self.cache.slot
        self.follow_latest_use()
        residents = [Resident(key.expert, self.pool, slot_of(key), records[key.expert]) for key in keys]
        for resident in residents:
            self._streams.wait(self._ready.pop(resident.slot, None))
        return residents

    def follow_latest_use(self) -> None:
        """Make later compute of the calling thread begin behind the use before, and so behind the copies it saw."""
        self._streams.wait(self._latest_use)

    def have_copied(self, slots: Iterable[int]) -> bool:
        """Whether all copies into slots have ended, so that compute that is started later need not wait for them."""
        for slot in self._ready.keys() & set(slots):
            if not self._streams.done(self._ready[slot]):
                return False
            del self._ready[slot]
        return True

    def end_use(self, keys: Iterable[ExpertKey]) -> None:
        """Unpin experts between `begin_use` and here, on which no more compute will be started."""
        cache, event = self.cache, self._streams.compute_event()
        self._latest_use = event
        for key in keys:
            self._last_use[cache.slot(key)] = event
            cache.unpin(key)

    def end_look_up(self, slots: Iterable[int]) -> None:
        """Note that compute started until now may use slots, from which no expert has moved since."""
        self._latest_use = event = self._streams.compute_event()
        for slot in slots:
            self._last_use[slot] = event

    def begin_use_of_all(self) -> None:
        """Make later compute of the calling thread wait until every resident expert is ready."""
        self.follow_latest_use()
        for event in self._ready.values():
            self._streams.wait(event)
        self._ready.clear()

    def end_use_of_all(self) -> None:
        """Note that compute started until now may use any slot."""
        self._latest_use = self._last_use_of_all = self._streams.compute_event()
        self._last_use.clear()

    def release(self, keys: Iterable[ExpertKey]) -> None:
        """Unpin experts without `begin_use`: this stream has not waited for another's use, which stays the last one."""
        for key in keys:
            self.cache.unpin(key)

    def start(self, to_start: deque[ExpertKey]) -> None:
        """Start copies, in order, while there is a slot and a place in flight for them."""
        decisions = self._stats.now.decisions
        while to_start and self.transfers.has_room:
            transfer = self.copy(to_start[0])
            if transfer is None:
                return
            to_start.popleft()
            if transfer.source is Tier.HOST:
                decisions.copied += 1
            else:
                decisions.read += 1

    def copy(self, key: ExpertKey, *, only_if_likelier: bool = False) -> Transfer | None:
        """Start the copy of an absent expert; return None where no slot may be taken for it.

        Args:
            only_if_likelier: where the future is forecast, evict only an expert that is worth less.
        """
        cache, evictions = self.cache, self.cache.evictions
        worth = cache.forecast.worth[key] if only_if_likelier and cache.forecast is not None else None
        slot = cache.reserve(key, worth=worth)
        self._stats.now.evictions += cache.evictions - evictions
        if self._prefetcher is not None:
            for gone in cache.evicted:
                self._prefetcher.ledger.evict(gone)
        self.pool.discard(cache.take_emptied())
        if slot is None:
            return None
        return self.transfers.start(key, slot, self._free_after(slot))

    def prefetch(self, waiting: set[ExpertKey] | None = None) -> list[ExpertKey]:
        """Start prefetches while the link has room, and take back those that come too late.

        Returns:
            The experts of `waiting` that have arrived meanwhile, pinned.
        """
        prefetcher, transfers = self._prefetcher, self.transfers
        arrived: list[ExpertKey] = []
        if prefetcher is None or not prefetcher.active:
            return arrived
        try:
            while (transfer := transfers.poll_completed()) is not None:
                arrived += self.settle(transfer, waiting)
        except ExpertReadError:
            self.release(arrived)  # the caller sees the error and not these
            raise
        for key in prefetcher.overdue(transfers.prefetches()):
            if transfers.drop(key):
                self.cache.abort(key)
                prefetcher.ledger.drop(key)
        while transfers.num_copying < self._max_prefetches and transfers.has_room:
            found = prefetcher.take()
            self.pool.discard(self.cache.take_emptied())
            if found is None:
                break
            transfers.start(*found, self._free_after(found[1]), prefetch=True)
        return arrived

    def await_one(self, waiting: set[ExpertKey]) -> list[ExpertKey]:
        """Wait for the next copy to end; return its expert, pinned, if it is one of `waiting`."""
        assert len(self.transfers), "waiting for a copy that was never started"
        transfer = self.transfers.poll_completed()
        if transfer is None:
            begin = time.perf_counter()
            transfer = self.transfers.wait_completed()
            self._stats.now.stall_s += time.perf_counter() - begin
        return self.settle(transfer, waiting)

    def settle(self, transfer: Transfer, wanted: set[ExpertKey] | None = None) -> list[ExpertKey]:
        """Enter an ended copy; return its expert, pinned, if it is wanted, and take it out of `wanted`.

        Raises:
            ExpertReadError: the copy of a wanted expert failed.
        """
        cache, key = self.cache, transfer.key
        if transfer.error is not None:
            cache.abort(key)
            if self._prefetcher is not None:
                self._prefetcher.ledger.drop(key)
            if wanted and key in wanted:
                raise transfer.error
            return []
        cache.commit(key)
        now = self._stats.now
        if transfer.source is Tier.DISK:
            now.bytes_from_disk += transfer.num_bytes
        else:
            now.bytes_from_host += transfer.num_bytes
        self._ready[transfer.slot] = transfer.event
        if wanted and key in wanted:
            wanted.discard(key)
            return [key]
        cache.unpin(key)
        return []

    def settle_ended(self) -> None:
        """Enter every copy that has ended; no layer waits for any."""
        while (transfer := self.transfers.poll_completed()) is not None:
            self.settle(transfer)

    def settle_all(self) -> None:
        """Let every copy end, and enter it; no layer waits for any."""
        while len(self.transfers):
            self.settle(self.transfers.wait_completed())

    def set_limit(self, limit: int) -> None:
        """Change how much of the cache may be used; see `ExpertCache.set_limit`.

        A device gives back and takes whole segments: as many slots as the limit keep their memory, and some more.
        """
        evictions = self.cache.evictions
        if isinstance(self.pool, SegmentedPool):
            limit = self._resize(self.pool, limit)
        self.pool.discard(self.cache.set_limit(limit))
        self._stats.now.evictions += self.cache.evictions - evictions

    def _resize(self, pool: SegmentedPool, limit: int) -> int:
        """Give segments beyond the limit back, or take more up to it where there is memory; return the slots left."""
        left, gone = pool.num_open, []
        if limit == left:
            return limit  # as in most passes
        for segment in sorted(pool.segments_to_spare(), key=lambda one: self.cache.uses_in(pool.slots_of(one))):
            slots = pool.slots_of(segment)
            if left - len(slots) >= limit and self.cache.close(slots):
                left -= len(slots)
                gone.append(segment)
        if gone:
            self._streams.finish()  # kernels may read them, and copies that failed may still write to them
            for slot in self._ready.keys() & {slot for segment in gone for slot in pool.slots_of(segment)}:
                del self._ready[slot]
            pool.give_back(gone)
        for segment in pool.segments(is_open=False):
            slots = pool.slots_of(segment)
            if left + len(slots) > limit or not pool.take(segment):
                break
            # The memory may be one that queued kernels of an earlier owner still use.
            self._last_use.update(dict.fromkeys(slots, self._streams.compute_event()))
            self.cache.open(slots)
            left += len(slots)
        return left

    def _free_after(self, slot: int) -> object:
        """Return the event after which a slot may be written: of a copy that nothing used, else of its last use."""
        return self._ready.get(slot) or self._last_use.get(slot, self._last_use_of_all)

    def clear(self) -> None:
        """Reset to nothing resident and nothing in flight, whatever state the bookkeeping is in."""
        self.transfers.abandon()
        self.cache.clear(self.pool.closed_slots())
        self.pool.discard(list(range(self.pool.num_slots)))  # whatever the limit becomes, none keeps pages for nobody
