"""ExpertRuntime over real files: every fetched weight is the demanded expert's, with and without a host tier."""

import threading
from contextlib import closing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.expert_runtimes import (
    DEMANDS,
    NUM_EXPERTS,
    NUM_LAYERS,
    ThreadStreams,
    build,
    each,
    fetch,
    fill_host,
)
from moeflow.core import ExpertKey
from moeflow.offload.streams import HostStreams
from moeflow.policy.cache import POLICIES


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), st.integers(1, 7), st.sampled_from([0, 4, 9]), st.booleans(), DEMANDS)
def test_any_demand_is_fetched_right(experts_file, policy, num_slots, host_slots, threads, demands):
    path, values = experts_file
    with build(path, num_slots, policy, host_slots, ThreadStreams() if threads else None) as runtime:
        runtime.begin_forward(1, 1, continues=True)
        for layer, experts in demands:
            fetch(runtime, layer, sorted(experts), values)
            runtime.check_integrity()
        stats = runtime.stats()["decode"]
        assert stats["hits"] + stats["misses"] == sum(len(experts) for _, experts in demands)


def test_host_tier_saves_the_disk(experts_file):
    path, values = experts_file
    with build(path, 2, host_slots=18) as runtime:
        runtime.begin_forward(1, 1, continues=True)
        for _ in range(3):
            for layer in range(NUM_LAYERS):
                fetch(runtime, layer, list(range(NUM_EXPERTS)), values)
        stats = runtime.stats()["decode"]
        assert runtime.stats()["io"]["reads"] == NUM_LAYERS * NUM_EXPERTS
        assert stats["bytes_from_host"] > stats["bytes_from_disk"] // 2


def test_iterator_closed_early_leaves_the_runtime_usable(experts_file):
    path, values = experts_file
    with build(path, 4) as runtime:
        for stop_after in range(4):
            with closing(runtime.fetch(0, list(range(NUM_EXPERTS)))) as fetched:
                for number, _ in enumerate(each(fetched)):
                    if number == stop_after:
                        break
            fetch(runtime, 1, [0, 5], values)
            fetch(runtime, 0, list(range(NUM_EXPERTS)), values)
            runtime.check_integrity()


def test_expert_in_flight_is_not_copied_a_second_time(experts_file):
    path, values = experts_file
    with build(path, 6) as runtime:
        fetched = runtime.fetch(0, [0, 1, 2, 3])
        next(fetched)
        fetched.close()  # the others are still on their way, or have just arrived
        fetch(runtime, 0, [0, 1, 2, 3], values)
        assert runtime.stats()["io"]["reads"] == 4


def test_resident_experts_come_first(experts_file):
    path, values = experts_file
    with build(path, 6) as runtime:
        fetch(runtime, 0, [4, 5], values)
        with closing(runtime.fetch(0, [0, 1, 4, 5])) as fetched:
            order = [expert for expert, _ in each(fetched)]
        assert set(order[:2]) == {4, 5}


class HeldStreams(HostStreams):
    """Copies that do not run until they are released, and compute that never waits: a slow GPU queue."""

    def __init__(self):
        self.queued, self.released = [], threading.Event()

    def copy(self, target, source, after, **options):
        self.queued.append((target, source))
        return self.released

    def synchronize(self, event):
        if event is not None:
            event.wait()

    def release(self):
        for target, source in self.queued:
            target.copy_(source)
        self.released.set()


def test_host_slot_is_not_overwritten_while_a_copy_reads_it(experts_file, monkeypatch):
    path, values = experts_file
    streams = HeldStreams()
    runtime = build(path, 2, host_slots=1, streams=streams)
    transfers, read_again = runtime._transfers, threading.Event()
    first, second = ExpertKey(0, 1), ExpertKey(0, 2)
    transfers.start(first, runtime.cache.reserve(first), None)
    transfers.wait_completed()
    read = runtime.store.read

    def reading(key, record, **how):
        found = read(key, record, **how)
        read_again.set()
        return found

    monkeypatch.setattr(runtime.store, "read", reading)
    transfers.start(second, runtime.cache.reserve(second), None)
    read_again.wait(0.3)  # it must not come: the only host slot is still being copied from
    streams.release()
    transfers.wait_completed()
    record = runtime.records(0)[0]
    assert torch.equal(runtime._residency.pool.views(runtime.cache.slot(first), record)["w"], values[0, 1])
    runtime.close()


def test_an_interrupt_while_experts_are_unpinned_comes_out_as_it_is(experts_file, monkeypatch):
    path, values = experts_file
    runtime = build(path, 4)
    fetch(runtime, 0, [0, 1, 2], values)
    unpin, struck = runtime.cache.unpin, []

    def interrupted(key):
        unpin(key)
        if not struck:
            struck.append(key)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runtime.cache, "unpin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(runtime.fetch(0, [0, 1, 2]))
    fetch(runtime, 0, [2, 1, 0], values)
    runtime.check_integrity()
    runtime.close()


def test_waiting_that_residents_hide_is_told_from_waiting(experts_file, monkeypatch):
    path, values = experts_file
    with build(path, 6, host_slots=18) as runtime:
        fill_host(runtime, values)
        fetch(runtime, 0, [0, 1], values)
        runtime.reset_stats()
        fetch(runtime, 0, [0, 1, 2], values)  # copies of this stand-in have ended when they are started
        fetch(runtime, 0, [0, 1, 2], values)
        decisions = runtime.stats()["prefill"]["decisions"]
        assert (decisions["layers_ready"], decisions["layers_waited"]) == (1, 0)
        assert (decisions["went_on_with_resident"], decisions["hidden_behind_resident"]) == (1, 1)
        assert (decisions["resident"], decisions["copied"], decisions["read"]) == (5, 1, 0)
    with build(path, 6) as runtime:
        fetch(runtime, 0, [0, 1], values)
        assert runtime.stats()["prefill"]["decisions"]["went_on_with_resident"] == 0
        runtime.reset_stats()
        read, wait, waits = runtime.store.read, runtime._transfers.wait_completed, threading.Event()

        def reading(key, record, **how):
            waits.wait(10)
            return read(key, record, **how)

        def waiting():
            waits.set()
            return wait()

        monkeypatch.setattr(runtime.store, "read", reading)
        monkeypatch.setattr(runtime._transfers, "wait_completed", waiting)
        fetch(runtime, 0, [0, 1, 2], values)
        decisions = runtime.stats()["prefill"]["decisions"]
        assert (decisions["layers_ready"], decisions["layers_waited"]) == (0, 1)
        assert (decisions["went_on_with_resident"], decisions["hidden_behind_resident"]) == (1, 0)
        assert (decisions["resident"], decisions["copied"], decisions["read"]) == (2, 0, 1)
