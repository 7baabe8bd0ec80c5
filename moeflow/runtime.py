"""The runtime behind one model: serves a layer's experts from the tiers, and owns everything that must be released.

The one place that moves an expert between states: it asks the cache for a slot, the transfers for a copy, and hands
out weights only when they are there. Knows nothing of routers or arithmetic.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch

from moeflow.cache import ExpertCache
from moeflow.core import PAGE_BYTES, ExpertKey, RecordLayout, Tier
from moeflow.errors import ClosedModelError, ExpertReadError
from moeflow.governor import Governor
from moeflow.hardware import process_memory_bytes
from moeflow.host_compute import HostCompute
from moeflow.misses import MissSplit
from moeflow.pool import Resident, SlotPool
from moeflow.prediction_loop import PredictionLoop, Routes
from moeflow.predictors.protocol import Predictor
from moeflow.route_observer import RouteObserver
from moeflow.stats import Stats
from moeflow.store import ExpertStore
from moeflow.streams import Streams
from moeflow.transfer import HostTier, Transfer, Transfers

_MAX_PREFETCHES = 2  # copies under way while nobody waits: more would only stand before a demand


class _Parts(NamedTuple):
    """What close() and garbage collection release, in this order."""

    transfers: Transfers
    store: ExpertStore
    pools: list[SlotPool]

    def release(self) -> None:
        try:
            self.transfers.close()
        finally:
            self.store.close()
            for pool in self.pools:
                pool.close()


class ExpertRuntime:
    """`model.moeflow`: the experts of one model inside their budget.

    Args:
        store: the far tier.
        pool: device slots.
        cache: who sits in them.
        streams: the order between copies and compute on the device.
        host: the pinned tier, on machines where the device has its own memory.
        num_threads: disk reads in flight.
        expert_budget_bytes: what the user allowed; the slots' bytes when None.
        governor: moves the number of usable slots with the memory that is free ("auto" on the CPU).
        prediction: says what to prefetch; None for demand only.
        misses: says which experts the CPU computes in the host tier; None where all are copied.
    """

    def __init__(
        self,
        store: ExpertStore,
        pool: SlotPool,
        cache: ExpertCache,
        streams: Streams,
        *,
        host: HostTier | None = None,
        num_threads: int = 4,
        expert_budget_bytes: int | None = None,
        governor: Governor | None = None,
        prediction: PredictionLoop | None = None,
        misses: MissSplit | None = None,
    ):
        assert misses is None or host is not None, "without a host tier no expert lies anywhere else"
        self.store = store
        self.cache = cache
        self.device = pool.device
        self.observers: list[RouteObserver] = []
        self.parallel = None  # the model's ExpertParallel, where its experts are spread over processes
        self._budget_bytes = expert_budget_bytes
        self._governor = governor
        self._prediction = prediction
        self._pool = pool
        self._slot_bytes = pool.stride
        self._unit_bytes = pool.stride if cache.sizes is None else PAGE_BYTES  # of what the cache counts
        self._host = host
        self._streams = streams
        self._transfers = Transfers(store, pool, streams, host=host, num_threads=num_threads)
        self._host_compute = None if misses is None else HostCompute(misses, host, self._transfers)
        self._ready: list[object] = [None] * pool.num_slots  # the end of the copy into each slot
        self._last_use: list[object] = [None] * pool.num_slots
        self._torn = False  # whether an interrupt may have left the bookkeeping half done
        self._stats = Stats()
        self._lock = threading.RLock()
        # Equal records become one object, so that layers share the tensor views of a slot.
        records: dict = {}
        self._records = [
            [
                records.setdefault(record, record)
                for record in map(source.layout.record_of, range(source.layout.num_experts))
            ]
            for source in store.layers
        ]
        parts = _Parts(self._transfers, store, [pool] if host is None else [pool, host.pool])
        self._release = weakref.finalize(self, _Parts.release, parts)

    def __enter__(self) -> "ExpertRuntime":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return not self._release.alive

    @property
    def predictor(self) -> Predictor | None:
        """Who predicts."""
        return None if self._prediction is None else self._prediction.predictor

    @property
    def predicting(self) -> bool:
        """Whether somebody wants to see the routes of the pass under way."""
        return self._prediction is not None and self._prediction.watching

    def records(self, layer: int) -> list[RecordLayout]:
        """Return how each expert of a layer is stored; equal records are one object."""
        return self._records[layer]

    def close(self) -> None:
        """Stop the threads, close the files, release every slot. The model cannot run afterwards."""
        with self._lock:
            self._release()
            self._pool = None
            for observer in self.observers:
                observer.close()

    def begin_forward(
        self, num_sequences: int, num_positions: int, *, continues: bool, token_ids: torch.Tensor | None = None
    ) -> None:
        """Say that a pass over [num_sequences, num_positions] new tokens begins.

        Args:
            continues: whether earlier positions lie in a key-value cache, which makes the pass decode.
            token_ids: the tokens, [num_sequences, num_positions], where they are known.
        """
        with self._lock:
            self._stats.begin_forward(num_sequences, num_positions, continues=continues)
            if self._governor is not None and not self.closed:
                self._mend()
                limit = self._governor.slots(self.cache.used, self.cache.limit, now=not continues)
                evictions = self.cache.evictions
                self._torn = True
                self._pool.discard(self.cache.set_limit(limit))
                self._torn = False
                self._stats.now.evictions += self.cache.evictions - evictions
            if self._prediction is not None and not self.closed:
                self._mend()
                self._torn = True
                self._prediction.begin_forward(token_ids, num_sequences, num_positions, continues, self._stats.now)
                self._prefetch()
                self._torn = False

    def serve(
        self,
        layer: int,
        experts: list[int],
        routes: Routes | None = None,
        num_tokens: list[int] | None = None,
    ) -> Iterator[list[Resident]]:
        """Yield every demanded expert once, where it lies: the resident ones together, then others as they arrive.

        Where experts wait for a slot, each resident one is yielded alone, so that its slot is free as soon as may be.
        Where the split of misses says so, weights come from the host tier instead of the device, before all others:
        copies run beside what the CPU does. What was yielded is valid until more is asked for. Closing the
        iterator early is safe at any point: copies still in flight end by themselves and become resident.

        Args:
            layer: which MoE layer.
            experts: distinct expert numbers; may be more than there are slots.
            routes: what the router chose for each token, for whoever predicts.
            num_tokens: how many tokens go to each of the experts; one where None.

        Raises:
            ExpertReadError: an expert could not be read. The runtime stays usable.
            ClosedModelError: close() was called.
        """
        with self._lock:
            if self.closed:
                raise ClosedModelError("the model was closed: load it again to use it.")
            self._mend()
            self._torn = True  # until this call has put everything back
            try:
                keys = [ExpertKey(layer, expert) for expert in experts]
                yield from self._serve(layer, keys, routes, num_tokens or [1] * len(keys))
            except (GeneratorExit, ExpertReadError):
                self._torn = False
                raise
            self._torn = False

    def stats(self) -> dict:
        """Return what has happened since loading or the last reset_stats(), with units in the names."""
        with self._lock:
            now, peak = process_memory_bytes()
            host, slot_bytes, unit_bytes = self._host, self._slot_bytes, self._unit_bytes
            return {
                "device": str(self.device),
                "policy": self.cache.policy,
                "slots": min(self.cache.limit, self.cache.num_slots),
                "num_experts": sum(source.layout.num_experts for source in self.store.layers),
                "prefill": self._stats.prefill.as_dict(),
                "decode": self._stats.decode.as_dict(),
                "memory": {
                    "expert_budget_bytes": self._budget_bytes or self.cache.limit * unit_bytes,
                    "all_experts_bytes": unit_bytes
                    * sum(
                        self.cache.size(ExpertKey(layer, expert))
                        for layer, records in enumerate(self._records)
                        for expert in range(len(records))
                    ),
                    "device_bytes": self.cache.used * unit_bytes,
                    "device_peak_bytes": self.cache.peak_used * unit_bytes,
                    "host_bytes": len(host.cache) * slot_bytes if host else 0,
                    "host_peak_bytes": host.cache.peak_used * slot_bytes if host else 0,
                    "staging_bytes": self.store.staging_bytes,
                    "process_bytes": now,
                    "process_peak_bytes": peak,
                },
                "miss": None if self._host_compute is None else self._host_compute.as_dict(),
                "prediction": None if self._prediction is None else self._prediction.as_dict(),
                "io": {**self.store.stats(), "threads": self._transfers.num_threads},
            }

    def reset_stats(self) -> None:
        """Begin to count anew; what is resident stays."""
        with self._lock:
            self._stats.reset()
            if self._prediction is not None:
                self._prediction.reset_stats()
            self.cache.peak_used = self.cache.used
            if self._host is not None:
                self._host.cache.peak_used = len(self._host.cache)

    def check_integrity(self) -> None:
        """Assert the invariants of the residency maps and of the copies in flight."""
        with self._lock:
            self._mend()
            self._settle_unwanted()
            self.cache.check_integrity()
            if self._host is not None:
                self._host.cache.check_integrity()
            if not len(self._transfers):
                assert not self.cache.num_pinned, "a slot is pinned while nothing runs"
                assert self._host is None or not self._host.cache.num_pinned, "a host slot is pinned while nothing runs"

    def _mend(self) -> None:
        """Start from nothing resident if an interrupt struck in the middle of the bookkeeping."""
        if self._torn:
            self._transfers.abandon()
            self.cache.clear()
            if self._prediction is not None:
                self._prediction.clear()
            self._torn = False

    def _serve(self, layer, keys, routes, num_tokens):
        stats, cache, records = self._stats.now, self.cache, self._records[layer]
        if self._host_compute is not None:
            self._settle_unwanted()
        cache.touch(keys)
        held = [key for key in keys if cache.lookup(key) is not None]
        for key in held:
            cache.pin(key)
        absent = [key for key in keys if key not in cache.slots]
        in_flight = [key for key in keys if key in self._transfers]
        for key in in_flight:
            self._transfers.demand(key)
        on_host = []
        if self._host_compute is not None:
            num_tokens = dict(zip(keys, num_tokens, strict=True))
            on_host = self._host_compute.choose(absent, num_tokens, cache, self._slot_bytes)
        to_start, resident = deque(key for key in absent if key not in on_host), held.copy()
        waiting = {*to_start, *in_flight}
        went_on, stall_s = bool(waiting and (held or on_host)), stats.stall_s
        stats.decisions.layers_ready += not waiting
        stats.hits += len(held)
        stats.misses += len(absent) + len(in_flight)
        stats.waited_for_prefetch += len(in_flight)

        def arrive(arrived):
            resident.extend(arrived)
            held.extend(arrived)

        try:
            if self._prediction is not None:
                others = self._transfers.prefetches()
                self._prediction.demanded(layer, held, in_flight, absent, self._transfers.copy_s, others)
            self._start(to_start)
            if self._prediction is not None and routes is not None:
                self._prediction.observe(layer, routes, stats)
                arrive(self._prefetch(waiting))
            yield from self._serve_from_host(on_host, records, stats)
            while resident or waiting:
                if not resident:
                    self._start(to_start)
                    arrive(self._await_one(waiting, stats))
                    continue
                batch = [resident.pop()] if to_start else resident[::-1]
                if not to_start:
                    resident.clear()
                slots = [cache.slot(key) for key in batch]
                for slot in slots:
                    # This call's stream may be another than that of the call that had the expert copied or used it.
                    self._streams.wait(self._ready[slot])
                    self._streams.wait(self._last_use[slot])
                begin = time.perf_counter()
                yield [
                    Resident(key.expert, self._pool, slot, records[key.expert])
                    for key, slot in zip(batch, slots, strict=True)
                ]
                stats.compute_s += time.perf_counter() - begin
                event = self._streams.compute_event()
                for key, slot in zip(batch, slots, strict=True):
                    self._last_use[slot] = event
                    cache.unpin(key)
                    held.remove(key)
                if to_start:
                    self._start(to_start)
                elif self._prediction is not None:
                    arrive(self._prefetch(waiting))
            stats.decisions.layers_waited += stats.stall_s > stall_s
            stats.decisions.went_on_with_resident += went_on
            stats.decisions.hidden_behind_resident += went_on and stats.stall_s == stall_s
        except ExpertReadError:
            # Let the other copies end too: one that fails later must not be blamed on the next call.
            while len(self._transfers):
                self._settle(self._transfers.wait_completed(), wanted=())
            raise
        finally:
            for key in held:
                self._last_use[cache.slot(key)] = self._streams.compute_event()
                cache.unpin(key)
            if self._host_compute is not None:
                self._host_compute.release()

    def _serve_from_host(self, on_host: list[ExpertKey], records, stats):
        """Yield experts where they lie in the host tier; give one that the link has time for a device slot."""
        for key in on_host:
            record = records[key.expert]
            yield [self._host_compute.begin(key, record)]
            stats.compute_s += self._host_compute.end(key, record.num_bytes)
            stats.decisions.computed_on_host += 1
            # Without this an expert that is always computed here would never become resident.
            transfers = self._transfers
            if transfers.has_room and not transfers.num_on_link and key not in self.cache.slots:
                stats.decisions.copied_after_compute += self._copy(key, only_if_likelier=True) is not None

    def _settle_unwanted(self) -> None:
        """Enter what has arrived that nobody waits for."""
        while (transfer := self._transfers.poll_completed()) is not None:
            self._settle(transfer, wanted=())

    def _start(self, to_start: deque) -> None:
        """Start copies, in order, while there is a slot and a place in flight for them."""
        decisions = self._stats.now.decisions
        while to_start and self._transfers.has_room:
            transfer = self._copy(to_start[0])
            if transfer is None:
                return
            to_start.popleft()
            if transfer.source is Tier.HOST:
                decisions.copied += 1
            else:
                decisions.read += 1

    def _copy(self, key: ExpertKey, *, only_if_likelier: bool = False) -> Transfer | None:
        """Start the copy of an absent expert; None where no slot may be taken for it.

        Args:
            only_if_likelier: where the future is forecast, evict only an expert that is worth less.
        """
        cache, evictions = self.cache, self.cache.evictions
        worth = cache.forecast.worth[key] if only_if_likelier and cache.forecast is not None else None
        slot = cache.reserve(key, worth=worth)
        self._stats.now.evictions += cache.evictions - evictions
        if self._prediction is not None:
            self._prediction.evicted(cache.evicted)
        self._pool.discard(cache.take_emptied())
        if slot is None:
            return None
        return self._transfers.start(key, slot, self._last_use[slot])

    def _prefetch(self, waiting=()) -> list[ExpertKey]:
        """Start what is worth prefetching while the link has room, and take back what comes too late.

        Returns:
            The experts of `waiting` that have arrived meanwhile, pinned.
        """
        prediction, transfers, arrived = self._prediction, self._transfers, []
        if not prediction.active:
            return arrived
        while (transfer := transfers.poll_completed()) is not None:
            arrived += self._settle(transfer, waiting)
        for key in prediction.overdue(transfers.prefetches()):
            if transfers.drop(key):
                self.cache.abort(key)
                prediction.dropped(key)
        while transfers.num_copying < _MAX_PREFETCHES and transfers.has_room:
            found = prediction.take()
            self._pool.discard(self.cache.take_emptied())
            if found is None:
                break
            transfers.start(*found, self._last_use[found[1]], prefetch=True)
        return arrived

    def _await_one(self, waiting: set, stats) -> list[ExpertKey]:
        """Wait for the next copy to end; return it if this layer wants it."""
        assert len(self._transfers), "waiting for a copy that nobody started"
        transfer = self._transfers.poll_completed()
        if transfer is None:
            begin = time.perf_counter()
            transfer = self._transfers.wait_completed()
            stats.stall_s += time.perf_counter() - begin
        return self._settle(transfer, waiting)

    def _settle(self, transfer, wanted) -> list[ExpertKey]:
        """Enter an ended copy into the residency map, pinned if wanted; raise if a wanted one failed."""
        cache, key = self.cache, transfer.key
        if transfer.error is not None:
            cache.abort(key)
            if self._prediction is not None:
                self._prediction.dropped(key)
            if key in wanted:
                raise transfer.error
            return []
        cache.commit(key)
        now = self._stats.now
        if transfer.source is Tier.DISK:
            now.bytes_from_disk += transfer.num_bytes
        else:
            now.bytes_from_host += transfer.num_bytes
        self._ready[transfer.slot] = transfer.event
        if key in wanted:
            wanted.discard(key)
            return [key]
        cache.unpin(key)
        return []
