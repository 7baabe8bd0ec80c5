"""Copies through the host tier: the parts of an expert are on their way to the device while others are still read."""

import threading

import pytest

from helpers.expert_runtimes import PAGES, ThreadStreams, build, fetch, write_experts
from moeflow.checkpoint.store import ExpertStore
from moeflow.core import ExpertKey
from moeflow.errors import ExpertReadError
from moeflow.offload import transfers

EXPERT_BYTES = 4 * PAGES.size


class _PausedStore(ExpertStore):
    """Reads the last page of an expert only when `go_on` is set, and fails there if it is told to."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.go_on, self.fails = threading.Event(), False

    def _read_some(self, part, done):
        if (part.begin - PAGES.begin) % EXPERT_BYTES == EXPERT_BYTES - 4096:
            assert self.go_on.wait(10), "the first part of the expert did not go on while the last was read"
            if self.fails:
                raise OSError(5, "Input/output error")
        return super()._read_some(part, done)


class _NotedStreams(ThreadStreams):
    """Tells of each copy that ends."""

    def __init__(self):
        super().__init__()
        self.copied, self.on_copy = [], lambda: None

    def copy(self, target, source, after, **options):
        event = super().copy(target, source, after, **options)
        event.wait(10)
        self.copied.append(len(target))
        self.on_copy()
        return event


@pytest.fixture
def paused(tmp_path, monkeypatch):
    """A runtime with its streams and values, whose experts are read in parts of a page."""
    monkeypatch.setattr(transfers, "_PART_BYTES", 4096)
    path, values = write_experts(tmp_path / "experts.bin", PAGES)
    streams = _NotedStreams()
    with build(path, 3, host_slots=6, streams=streams, store_class=_PausedStore, layout=PAGES) as runtime:
        streams.on_copy = lambda: len(streams.copied) == 2 and runtime.store.go_on.set()
        yield runtime, streams, values


def prefetched(runtime, key):
    """Read an expert ahead, its parts in order, as prefetches are; return the transfer that has ended."""
    runtime._transfers.start(key, runtime.cache.reserve(key), None, prefetch=True)
    return runtime._transfers.wait_completed()


def test_what_has_been_read_is_copied_while_the_rest_is_read(paused):
    runtime, streams, values = paused
    runtime._residency.settle(prefetched(runtime, ExpertKey(1, 4)))
    assert streams.copied == [4096] * 3
    fetch(runtime, 1, [4], values)
    assert runtime.stats()["prefill"]["hits"] == 1


def test_an_expert_of_which_a_part_cannot_be_read_is_not_resident(paused):
    runtime, streams, values = paused
    key = ExpertKey(1, 4)
    runtime.store.fails = True
    ended = prefetched(runtime, key)
    assert streams.copied == [4096] * 2
    with pytest.raises(ExpertReadError, match=r"expert 4 of layers\.1 could not be read from .*: Input/output error"):
        runtime._residency.settle(ended, {key})
    assert not runtime.cache.slots
    assert not runtime._transfers._host.cache.slots
    runtime.check_integrity()
    runtime.store.fails = False
    fetch(runtime, 1, [4], values)


def test_a_demanded_expert_is_read_beside_itself_and_a_prefetch_is_not(paused):
    runtime, _, values = paused
    runtime.store.go_on.set()
    runtime._residency.settle(prefetched(runtime, ExpertKey(0, 0)))
    assert not runtime._transfers._threads._helpers
    fetch(runtime, 0, [1], values)
    assert len(runtime._transfers._threads._helpers) == 2
