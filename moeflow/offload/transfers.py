"""Copies of experts towards the device, from disk or from the host tier, one completion each.

Owns the table of copies in flight, so that no expert is copied twice at once. One thread at a time calls its methods
(the runtime's lock); only reads run elsewhere.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moeflow.checkpoint.reading.parts import one_by_one
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import ExpertKey, Tier
from moeflow.offload.copies.read_threads import ReadingThreads
from moeflow.offload.copies.slot_sampler import SlotSampler
from moeflow.offload.copies.transfer import Transfer, Work
from moeflow.offload.host_tier import HostTier
from moeflow.offload.slot_pool import SlotPool
from moeflow.offload.streams import Streams

_log = logging.getLogger(__name__)
_PART_BYTES = 1 << 20  # of a read, behind which a copy to a device begins
_MAX_MEASURED_COPIES = 32  # ended ones, kept until `take_copied`


class Transfers:
    """Starts copies and hands out their completions.

    Args:
        store: the far tier.
        pool: the device slots.
        streams: the order between copies and compute.
        host: the pinned tier, or None where device and host memory are one.
        num_threads: experts read from disk at a time; parts of them are read beside each other.
        sampler: compares some of the copies with their source; None for none.
    """

    def __init__(
        self,
        store: ExpertStore,
        pool: SlotPool,
        streams: Streams,
        *,
        host: HostTier | None = None,
        num_threads: int = 4,
        sampler: SlotSampler | None = None,
    ) -> None:
        self.sampler = sampler
        self.max_in_flight = 2 * num_threads if host is None else min(2 * num_threads, host.pool.num_slots)
        self.num_threads = num_threads
        self._store = store
        self._pool = pool
        self._streams = streams
        self._host = host
        self._in_flight: dict[ExpertKey, Transfer] = {}
        self._copying: list[Transfer] = []  # handed out, while the device may still run them
        self._copied: deque[Transfer] = deque(maxlen=_MAX_MEASURED_COPIES)
        self._copy_s = 0.0
        self._threads = ReadingThreads(num_threads)

    def __len__(self) -> int:
        return len(self._in_flight)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._in_flight

    @property
    def has_room(self) -> bool:
        """Whether one more copy may be started."""
        return len(self._in_flight) < self.max_in_flight

    @property
    def num_copying(self) -> int:
        """How many copies are under way, including those handed out that the device still runs."""
        self._end_copies()
        return len(self._in_flight) + len(self._copying)

    @property
    def num_on_link(self) -> int:
        """How many copies from the host tier are under way."""
        return len(self._on_link())

    @property
    def copy_s(self) -> float:
        """Seconds a copy takes, a moving average over the reads and copies that have ended."""
        return self._copy_s

    def start(self, key: ExpertKey, slot: int, after: object, *, prefetch: bool = False) -> Transfer:
        """Begin to copy an expert into a device slot.

        Args:
            key: an expert that is not in flight.
            slot: reserved for it.
            after: the event of the last compute that read the slot.
            prefetch: let every demanded copy go first.
        """
        assert key not in self._in_flight, f"a copy of {key} is in flight already"
        if self.sampler is not None:
            self.sampler.begin_write(slot)
        num_bytes = self._store.layers[key.layer].layout.record_of(key.expert).num_bytes
        if self._host is None:
            transfer = Transfer(key, slot, Tier.DISK, None, prefetch=prefetch)
            work: Work = (_read_to_device, self._store, self._threads, self._pool, transfer, num_bytes)
        else:
            host = self._host
            host.cache.touch([key])
            host_slot = host.cache.lookup(key)
            if host_slot is not None:
                host.cache.pin(key)
                transfer = Transfer(key, slot, Tier.HOST, host_slot, prefetch=prefetch)
                transfer.num_bytes = num_bytes
                self._in_flight[key] = transfer
                copy = (_copy_to_device, self._pool, host.pool, self._streams, transfer, num_bytes, after)
                self._threads.run_here(transfer, copy)
                return transfer
            host_slot = host.cache.reserve(key)
            assert host_slot is not None, "more copies in flight than host slots"
            transfer = Transfer(key, slot, Tier.DISK, host_slot, prefetch=prefetch)
            work = (_read_through_host, self._store, self._threads, self._pool, host.pool, self._streams, transfer,
                    after, host.last_copy[host_slot])  # fmt: skip
        transfer.give_work(work)
        self._in_flight[key] = transfer
        self._threads.put(transfer)
        return transfer

    def promote(self, key: ExpertKey) -> None:
        """Turn a prefetch in flight into a demanded copy: if it has not begun, it jumps the queue."""
        transfer = self._in_flight[key]
        if transfer.prefetch:
            transfer.prefetch = False
            self._threads.put(transfer)  # queued twice now: the second thread finds its work taken

    def drop(self, key: ExpertKey) -> bool:
        """Forget a prefetch that has not begun; return whether it could be. Its slot is the caller's again."""
        transfer = self._in_flight[key]
        if not transfer.prefetch or transfer.take_work() is None:
            return False
        del self._in_flight[key]
        if self._host is not None:
            self._host.cache.abort(key)
        return True

    @property
    def reading_here(self) -> bool:
        """Whether the calling thread is one that reads."""
        return self._threads.here or (self.sampler is not None and self.sampler.here)

    def prefetches(self) -> list[ExpertKey]:
        """List the experts whose prefetch is in flight."""
        return [key for key, transfer in self._in_flight.items() if transfer.prefetch]

    def compute_beside(self) -> bool:
        """Note that the CPU computes an expert while the copies on the link run; return whether there are any."""
        on_link = self._on_link()
        for transfer in on_link:
            transfer.beside = True
        return bool(on_link)

    def take_copied(self) -> list[Transfer]:
        """Return, once each, the latest copies from the host tier that have ended, with the `seconds` of each."""
        self._end_copies()
        copied = list(self._copied)
        self._copied.clear()
        return copied

    def wait_completed(self) -> Transfer:
        """Block until a copy has ended, and return it; its `error` says whether it failed."""
        return self._settle(self._threads.wait())

    def poll_completed(self) -> Transfer | None:
        """Return a copy that has ended, or None."""
        transfer = self._threads.poll()
        return None if transfer is None else self._settle(transfer)

    def close(self) -> None:
        """Let running copies end, drop waiting ones, stop the threads. A second call goes on where one was cut off."""
        for waiting in self._in_flight.values():
            waiting.take_work()
        self._threads.stop()
        if self.sampler is not None:
            self.sampler.stop()
        self._streams.finish()
        self._in_flight.clear()
        self._copying.clear()
        self._copied.clear()

    def after_fork(self) -> None:
        """Begin anew in the child of a fork: what was in flight ends there with an ExpertReadError."""
        self._threads.after_fork(self._in_flight.values())
        if self.sampler is not None:
            self.sampler.after_fork()

    def abandon(self) -> None:
        """Let running copies end and forget them all, settled or not; be ready again."""
        self.close()
        if self._host is not None:
            self._host.cache.clear()

    def _settle(self, transfer: Transfer) -> Transfer:
        del self._in_flight[transfer.key]
        if transfer.error is None:
            self._copying.append(transfer)
            self._end_copies()
            if self.sampler is not None:
                self.sampler.copied(transfer)
        if self._host is not None:
            cache = self._host.cache
            if transfer.source is Tier.DISK:
                if transfer.error is not None:
                    cache.abort(transfer.key)
                    return transfer
                cache.commit(transfer.key)
            if transfer.error is not None:
                cache.unpin(transfer.key)
                return transfer
            assert transfer.host_slot is not None, "with a host tier every copy passes through one of its slots"
            self._host.last_copy[transfer.host_slot] = transfer.event
            cache.unpin(transfer.key)
        return transfer

    def _on_link(self) -> list[Transfer]:
        self._end_copies()
        started = [transfer for transfer in self._in_flight.values() if transfer.source is Tier.HOST]
        return self._copying + [transfer for transfer in started if not self._streams.done(transfer.event)]

    def _end_copies(self) -> None:
        """Measure the copies that have ended on the device, and keep those that still run."""
        running = []
        for transfer in self._copying:
            if not self._streams.done(transfer.event):
                running.append(transfer)
                continue
            transfer.seconds += self._streams.copy_s(transfer.event)
            self._copy_s += (transfer.seconds - self._copy_s) * (0.1 if self._copy_s else 1.0)
            if transfer.source is Tier.HOST:
                self._copied.append(transfer)
        self._copying = running


class Parts(NamedTuple):
    """What a runtime releases when it is closed or collected, in this order and as often as it is asked to."""

    transfers: Transfers
    store: ExpertStore
    pools: list[SlotPool]

    def release(self) -> None:
        """Stop the threads, close the files, release every slot."""
        failure: Exception | None = None
        try:
            self.transfers.close()
        except Exception as error:  # the device's, once the threads have ended; an interrupt may leave them reading
            failure = error
        self.store.close()
        for pool in self.pools:
            pool.close()
        if isinstance(failure, RuntimeError):
            _log.warning("the GPU failed before the model was released (%s)", str(failure).partition("\n")[0])
        elif failure is not None:
            raise failure

    def collect(self) -> None:
        """Release all this where nothing refers to the runtime any more, whichever thread finds that out.

        The garbage collector may run inside a reading thread, which cannot wait for its own end.
        """
        if self.transfers.reading_here:
            threading.Thread(target=self.release, name="moeflow-release").start()
        else:
            self.release()


def _read(
    store: ExpertStore,
    threads: ReadingThreads,
    transfer: Transfer,
    record: np.ndarray,
    landed: Callable[[int, int], None] | None = None,
) -> int:
    """Read an expert: its parts beside each other where it is demanded and no other waits for a thread."""
    share = threads.share if not transfer.prefetch and threads.has_room else one_by_one
    # Cut only for a device: one large read keeps a disk as busy as several small ones.
    part_bytes = None if landed is None else _PART_BYTES
    return store.read(transfer.key, record, landed=landed, share=share, part_bytes=part_bytes)


def _read_to_device(
    store: ExpertStore, threads: ReadingThreads, pool: SlotPool, transfer: Transfer, num_bytes: int
) -> None:
    pool.fit(transfer.slot, num_bytes)
    transfer.num_bytes = _read(store, threads, transfer, pool.bytes[transfer.slot])


def _read_through_host(
    store: ExpertStore,
    threads: ReadingThreads,
    pool: SlotPool,
    host_pool: SlotPool,
    streams: Streams,
    transfer: Transfer,
    after: object,
    last_copy: object,
) -> None:
    """Read an expert into its pinned slot, and start to copy each part of it as soon as that is there."""
    assert transfer.host_slot is not None, "it comes through the host tier"
    of = host_pool.record(transfer.host_slot, host_pool.stride)

    def landed(begin: int, end: int) -> None:
        # Behind the part before: this one runs in another stream where a prefetch was promoted meanwhile.
        before = transfer.event or after
        to = pool.record(transfer.slot, end)[begin:]  # not held while bytes are read: an error would hold it on
        transfer.event = streams.copy(to, of[begin:end], before, is_prefetch=transfer.prefetch)

    streams.synchronize(last_copy)
    try:
        transfer.num_bytes = _read(store, threads, transfer, host_pool.bytes[transfer.host_slot], landed)
    except BaseException:
        streams.synchronize(transfer.event)  # both slots may be written next
        raise


def _copy_to_device(
    pool: SlotPool, host_pool: SlotPool, streams: Streams, transfer: Transfer, num_bytes: int, after: object
) -> None:
    assert transfer.host_slot is not None, "it comes from the host tier"
    source = host_pool.record(transfer.host_slot, num_bytes)
    target, is_prefetch = pool.record(transfer.slot, num_bytes), transfer.prefetch
    transfer.event = streams.copy(target, source, after, is_prefetch=is_prefetch)
