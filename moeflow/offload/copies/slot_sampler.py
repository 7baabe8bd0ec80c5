"""Compares a slot with its source by checksum after some of the copies into it; names what differs and counts it.

Which copies are looked at is drawn with a seed, and a budget of bytes a second bounds the work. A thread of its own
reads the slot without pinning it: what was evicted or written again meanwhile is not judged. So no expert stays longer
or goes earlier than without it.
"""

import logging
import mmap
import queue
import random
import threading
import time
import zlib
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from moeflow.checkpoint.store import ExpertStore
from moeflow.core import ExpertKey, RecordLayout, align_up
from moeflow.errors import MoeflowError
from moeflow.offload.copies.transfer import Transfer
from moeflow.offload.slot_pool import SlotPool
from moeflow.offload.streams import Streams
from moeflow.policy.cache import ExpertCache

_log = logging.getLogger(__name__)

SHARE = 1 / 32  # of copies
BYTES_PER_S = 4 << 20  # read for comparisons, at most: a core takes about 2 ms for them
_SEED = 0
_MOST_NAMED = 16


class _Job(NamedTuple):
    """A copy to look at: the expert, its slot, how many copies into the slot had begun, and the copy's end."""

    key: ExpertKey
    slot: int
    writes: int
    event: object


class SlotSampler:
    """Watches the copies of one runtime.

    Args:
        store: the source of every copy.
        pool: the slots.
        cache: which expert sits in which slot.
        streams: the order between copies and compute.
        share: of copies that are looked at, where the budget allows.
        bytes_per_s: the budget, of bytes read from slots and, where the source has no checksums, from the source again.
    """

    def __init__(
        self,
        store: ExpertStore,
        pool: SlotPool,
        cache: ExpertCache,
        streams: Streams,
        *,
        share: float = SHARE,
        bytes_per_s: float = BYTES_PER_S,
    ) -> None:
        self._store, self._pool, self._cache, self._streams = store, pool, cache, streams
        self._share, self._bytes_per_s = share, bytes_per_s
        self._random = random.Random(_SEED)
        self._allowance, self._latest = float(bytes_per_s), time.monotonic()
        self._writes: Counter[int] = Counter()  # by slot: copies into it that have begun
        self._checked = self._bytes = self._passed_over = 0
        self._seconds = 0.0
        self._differing: list[dict[str, Any]] = []
        self._num_differing = 0
        self._memory: np.ndarray | None = None  # for a second read of a source
        self._jobs: queue.SimpleQueue[_Job | None]
        self._thread: threading.Thread | None
        self._busy: bool
        self._begin()

    def begin_write(self, slot: int) -> None:
        """Note that a copy into a slot begins; under the runtime's lock, as `copied`."""
        self._writes[slot] += 1

    def copied(self, transfer: Transfer) -> None:
        """Look at a copy that has ended, if it is drawn and the budget allows."""
        if self._random.random() >= self._share:
            return
        num_bytes = self._record(transfer.key).num_bytes
        now, most = time.monotonic(), max(self._bytes_per_s, 2.0 * num_bytes)
        self._allowance = min(self._allowance + (now - self._latest) * self._bytes_per_s, most)
        self._latest = now
        cost = num_bytes if self._has_checksum(transfer.key) else 2 * num_bytes
        if self._busy or cost > self._allowance:
            self._passed_over += 1
            return
        self._allowance -= cost
        self._busy = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(self._jobs,), name="moeflow-integrity", daemon=True)
            self._thread.start()
        self._jobs.put(_Job(transfer.key, transfer.slot, self._writes[transfer.slot], transfer.event))

    def as_dict(self) -> dict[str, Any]:
        """Return what was found since loading, with units in the names."""
        return {
            "mode": "sample",
            "share": self._share,
            "bytes_per_s": self._bytes_per_s,
            "checked": self._checked,
            "checked_bytes": self._bytes,
            "passed_over": self._passed_over,
            "seconds": self._seconds,
            "differing": self._num_differing,
            "named": list(self._differing),
        }

    @property
    def here(self) -> bool:
        """Whether the calling thread is the one that compares."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """End the thread behind the comparison under way; the next copy starts it anew."""
        thread = self._thread
        if thread is not None:
            self._jobs.put(None)
            thread.join()
        self._begin()

    def after_fork(self) -> None:
        """Begin anew in the child of a fork, where the thread is not."""
        self._begin()

    def _begin(self) -> None:
        self._jobs, self._thread, self._busy = queue.SimpleQueue(), None, False

    def _run(self, jobs: "queue.SimpleQueue[_Job | None]") -> None:
        while (job := jobs.get()) is not None:
            begin = time.perf_counter()
            try:
                self._compare(job)
            except MoeflowError as error:  # the source is closed, or cannot be read: whoever needs it next says so
                self._passed_over += 1
                _log.info("a slot could not be compared with its source: %s", error)
            self._seconds += time.perf_counter() - begin
            self._busy = False

    def _compare(self, job: _Job) -> None:
        """Compare a slot with its source, unless something else may be in it by now."""
        record = self._record(job.key)
        self._streams.synchronize(job.event)
        found = self._sum(self._slot(job.slot, record.num_bytes), job.key)
        if self._cache.slots.get(job.key) != job.slot or self._writes[job.slot] != job.writes:
            self._passed_over += 1
            return
        expected = self._source_sum(job.key)
        self._checked += 1
        self._bytes += record.num_bytes
        if found != expected:
            self._tell(job, found, expected)

    def _tell(self, job: _Job, found: int, expected: int) -> None:
        layout = self._store.layers[job.key.layer].layout
        file = self._store.file_of(job.key)
        self._num_differing += 1
        if len(self._differing) < _MOST_NAMED:
            about = {"file": str(file), "layer": job.key.layer, "path": layout.name, "expert": job.key.expert}
            self._differing.append(about | {"slot": job.slot})
        _log.warning(
            "slot %d holds other bytes than expert %d of %s (MoE layer %d) in %s: checksum %08x, expected %08x. The "
            "memory, the disk or its driver returns wrong bytes: answers since may be wrong. Check the memory and load "
            "the model again.",
            job.slot, job.key.expert, layout.name, job.key.layer, file, found, expected,
        )  # fmt: skip

    def _slot(self, slot: int, num_bytes: int) -> np.ndarray:
        """Return a slot's bytes: as they lie in host memory, or copied from a device."""
        if self._pool.device.type == "cpu":
            return self._pool.bytes[slot][:num_bytes]
        import torch

        with torch.cuda.stream(torch.cuda.Stream(self._pool.device)):
            return self._pool.record(slot, num_bytes).cpu().numpy()

    def _source_sum(self, key: ExpertKey) -> int:
        checksums = self._store.layers[key.layer].crc32
        if checksums is not None:
            return checksums[key.expert]
        needed = align_up(self._record(key).num_bytes, mmap.PAGESIZE)
        if self._memory is None or len(self._memory) < needed:
            self._memory = np.frombuffer(mmap.mmap(-1, needed), np.uint8)
        self._store.read(key, self._memory)
        return self._sum(self._memory, key)

    def _sum(self, raw: np.ndarray, key: ExpertKey) -> int:
        """Return the checksum of a record: of all its bytes where the source has one, else of its tensors'.

        What lies between tensors is written by no read.
        """
        record = self._record(key)
        if self._has_checksum(key):
            return zlib.crc32(raw[: record.num_bytes].data)
        found = 0
        for spec in record.tensors:
            found = zlib.crc32(raw[spec.offset : spec.offset + spec.num_bytes].data, found)
        return found

    def _has_checksum(self, key: ExpertKey) -> bool:
        return self._store.layers[key.layer].crc32 is not None

    def _record(self, key: ExpertKey) -> RecordLayout:
        return self._store.layers[key.layer].layout.record_of(key.expert)
